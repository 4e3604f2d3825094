"""Relations and states of a live teacher: the loss by its definition, and students that learn from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_world import World, capture, recipe_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_student_init import DEEP, some_rows, student
from test_sweep import NARROW, SWEEP, WIDE, job_of
from test_sweep_resume import to_end
from torch import Tensor

from overproof.artifacts import Artifact
from overproof.data.manifest import Manifest
from overproof.distill.feature_losses import LayerOutputs, capture_layers, relation_loss, state_loss
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.trial_job import TrialJob
from overproof.errors import InputError
from overproof.models.hf_directory import build_model, load_model
from overproof.models.llama import Llama

ROWS, PLACES = 2, 5
cases = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**31), "heads": st.sampled_from([1, 2, 4]), "spread": st.floats(0.1, 4)}
)


def draw(seed: int, width: int, spread: float, keys: int | None = None) -> LayerOutputs:
    generator = torch.Generator().manual_seed(seed)
    widths = (width, width, keys or width, keys or width)
    parts = (torch.randn(ROWS, PLACES, w, generator=generator, dtype=torch.float64) * spread for w in widths)
    return LayerOutputs(*parts)


def by_definition(student: LayerOutputs, teacher: LayerOutputs, heads: int, mask: Tensor) -> Tensor:
    """Equations 5 and 6 of arXiv 2012.15828, a place at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student.attention, teacher.attention, strict=True):
        for row in range(ROWS):
            real = mask[row]
            for head in range(heads):
                logs = []
                for values in (ours, theirs):
                    width = values.shape[-1] // heads
                    x = values[row, real, head * width : (head + 1) * width]
                    logs.append(torch.log_softmax(x @ x.T / width**0.5, -1))
                log_p, log_q = logs
                total = total + (log_q.exp() * (log_q - log_p)).sum() / heads
    return total / mask.sum()


@given(cases)
@settings(max_examples=40)
def test_value_and_gradient_are_those_of_the_paper(case: dict[str, Any]) -> None:
    student, teacher = draw(case["seed"], 8, case["spread"]), draw(case["seed"] + 1, 12, case["spread"], keys=4)
    mask = torch.tensor([[True] * PLACES, [True, True, True, False, False]])
    a, b = (LayerOutputs(*(part.clone().requires_grad_() for part in student)) for _ in range(2))
    expected, found = by_definition(a, teacher, case["heads"], mask), relation_loss(b, teacher, case["heads"], mask)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(b.attention, a.attention, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@given(cases)
@settings(max_examples=20)
def test_a_student_like_its_teacher_has_nothing_to_learn(case: dict[str, Any]) -> None:
    teacher = draw(case["seed"], 8, case["spread"])
    mask = torch.tensor([[True] * PLACES, [True, False, False, False, False]])
    same = LayerOutputs(*(part.clone().requires_grad_() for part in teacher))
    loss = relation_loss(same, teacher, case["heads"], mask) + state_loss(same.states, teacher.states, mask)
    loss.backward()
    assert float(loss.detach()) == 0
    for part in same:
        assert part.grad is not None
        assert float(part.grad.abs().max()) < 1e-12
    turned = LayerOutputs(*(part @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for part in teacher))
    assert float(relation_loss(turned, teacher, 1, mask)) == pytest.approx(0, abs=1e-9)  # relations alone count
    assert float(relation_loss(draw(case["seed"] + 1, 8, 1.0), teacher, case["heads"], mask)) > 0


def test_what_lies_behind_the_mask_changes_nothing() -> None:
    student, teacher = draw(1, 8, 1.0), draw(2, 8, 1.0)
    mask = torch.tensor([[True] * 3 + [False] * 2] * ROWS)
    other = LayerOutputs(*(torch.where(mask[..., None], part, 1e3) for part in student))
    assert torch.equal(relation_loss(student, teacher, 2, mask), relation_loss(other, teacher, 2, mask))
    assert torch.equal(state_loss(student.states, teacher.states, mask), state_loss(other.states, teacher.states, mask))


@pytest.mark.parametrize("kind", ["digits", "text"])
def test_a_layer_shows_its_queries_keys_values_and_states(kind: str, request: pytest.FixtureRequest) -> None:
    world: World = request.getfixturevalue(f"{kind}_world")
    config = DEEP[kind]
    model = build_model(config, Manifest.read(world.root), 5).eval()
    batch = some_rows(world)
    with capture_layers(model, {1, 3}) as found:
        prediction = world.predict(model, batch)
    assert set(found) == {1, 3}
    keys = config.kv_heads * config.hidden_size // config.heads if isinstance(config, Llama) else config.hidden_size
    for layer in found.values():
        assert [part.shape[-1] for part in layer] == [config.hidden_size, config.hidden_size, keys, keys]
    with torch.no_grad():
        if kind == "text":
            again = model.lm_head(model.model.norm(found[3].states))
        else:
            again = model.classifier(model.vit.layernorm(found[3].states)[:, :1])
    assert torch.equal(again, prediction.logits_BPV)
    attention = next(
        part for name, part in model.base_model.layers[3].named_modules() if name.endswith(("self_attn", "attention"))
    )
    assert torch.equal(found[3].values, attention.v_proj(_seen(world, model, batch, attention)))
    world.predict(model, batch)
    assert not any(module._forward_hooks for module in model.modules())


def _seen(world: World, model: Any, batch: dict[str, Tensor], attention: Any) -> Tensor:
    """What goes into an attention."""
    held: list[Tensor] = []
    hook = attention.q_proj.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    world.predict(model, batch)
    hook.remove()
    return held[0]


RELATIONS = {"relations": {"heads": 2, "weight": 0.5, "teacher_layer": 0}}
STATES = {"states": {"weight": 0.1}}


def begun(world: World, cached: Artifact, model: dict[str, Any], **changes: Any) -> TrialJob:
    told = student(model, temperature=2.0, **changes)
    return job_of(world.context("sweep", cached=cached, sweep={**SWEEP, "students": [told]}), "begun")


@pytest.mark.parametrize(
    "changes",
    [{"teacher": "live"}, RELATIONS, {**STATES, "teacher": "live"}, {**RELATIONS, **STATES, "teacher_weight": 0.0}],
    ids=["live", "relations", "states", "both"],
)
def test_a_student_beside_its_teacher_goes_on_to_the_last_bit(
    changes: dict[str, Any], digits_world: World, digits_cache: Artifact
) -> None:
    job = begun(digits_world, digits_cache, NARROW, **changes)
    whole = StudentTrainer(dataclasses.replace(job, checkpoints=begun(digits_world, digits_cache, NARROW).checkpoints))
    expected = to_end(whole)
    first = StudentTrainer(job)
    done = [first.run_to_validation() for _ in range(2)]
    first.checkpoint_writer.wait()
    second = StudentTrainer(job)
    assert second.resumed_step == done[-1].steps
    assert to_end(second) == expected
    assert all(a.equal(b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))
    for name in {"relations", "states"} & set(changes):
        values = [row[name] for row in expected[0].curve + expected[-1].curve if name in row]
        assert values[-1] < values[0]
    teacher = load_model(digits_world.artifacts["train"].local() / "model").state_dict()
    if whole.spec.teacher is not None:
        assert all(torch.equal(value, teacher[name]) for name, value in whole.spec.teacher.state_dict().items())
    whole.save_weights()
    assert set(load_model(Path(job.draft.uri) / job.folder).state_dict()) == set(whole.model.state_dict())


def test_text_students_of_another_width_learn_relations(text_world: World) -> None:
    cached = capture(text_world, None)
    shape = {"kind": "llama", "hidden_size": 64, "intermediate_size": 64, "layers": 2, "heads": 4, "kv_heads": 4}
    job = begun(text_world, cached, shape, **{"relations": {"heads": 4, "weight": 1.0}, "teacher": "live"})
    job = dataclasses.replace(job, settings=job.settings.model_copy(update={"steps": 6, "validation_rows": 8}))
    rows = StudentTrainer(job).run_to_validation().curve
    relations = [row["relations"] for row in rows if "relations" in row]
    assert relations[-1] < relations[0]


def test_live_outputs_are_those_of_a_cache_of_everything(digits_world: World) -> None:
    cached = capture(digits_world, 400, scheme={"kind": "dense"})
    runs = [StudentTrainer(begun(digits_world, cached, WIDE, teacher=how)) for how in ("cached", "live")]
    kept, live = (to_end(run)[0].curve for run in runs)
    for here, there in zip(kept, live, strict=True):
        assert here == pytest.approx(there, rel=2e-3)  # the cache rounds to half precision
    assert kept != live
    assert runs[1].spec.targets is None


def test_the_teacher_is_asked_once_a_step(digits_world: World, digits_cache: Artifact) -> None:
    run = StudentTrainer(begun(digits_world, digits_cache, NARROW, **RELATIONS, **STATES, teacher="live"))
    asked = []
    assert run.spec.teacher is not None
    run.spec.teacher.register_forward_hook(lambda *_: asked.append(1))
    assert len([row for row in run.run_to_validation().curve if "loss" in row]) == len(asked)


def test_a_control_has_no_teacher(digits_world: World, digits_cache: Artifact) -> None:
    job = begun(digits_world, digits_cache, NARROW, **RELATIONS)
    run = StudentTrainer(dataclasses.replace(job, distilled=False))
    assert (run.spec.teacher, run.spec.targets, run.projection) == (None, None, None)
    assert set(run.run_to_validation().curve[0]) == {"step", "loss", "learning_rate", "grad_norm"}


def test_what_cannot_be_compared_is_refused(digits_world: World, digits_cache: Artifact) -> None:
    def refusal(model: dict[str, Any], **relations: Any) -> str:
        with pytest.raises(InputError) as refused:
            StudentTrainer(begun(digits_world, digits_cache, model, relations={"heads": 2, "weight": 1.0, **relations}))
        return str(refused.value)

    assert "relations.teacher_layer 2: the teacher has 2 layers" in refusal(NARROW, teacher_layer=2)
    assert "relations.heads 16 does not divide 8, the width of queries or keys that it has" in refusal(NARROW, heads=16)
    assert "relations.heads 3 does not divide 32, the width of queries or keys that the teacher has" in refusal(
        {**NARROW, "hidden_size": 12}, heads=3
    )
    assert "it has 5 places in a row and the teacher 17" in refusal({**NARROW, "patch_size": 4})


def test_a_live_teacher_asks_nothing_of_the_cache() -> None:
    live = student(NARROW, temperature=7.0, teacher="live")
    recipe = recipe_of("digits", cache={"rows": 1}, sweep={**SWEEP, "students": [live]})
    assert recipe.temperatures == set()
    with pytest.raises(InputError, match=r"asks for temperature 7"):
        recipe_of("digits", sweep={**SWEEP, "students": [{**live, "teacher": "cached"}]})
