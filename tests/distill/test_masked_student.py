"""Zeros in a teacher's matrices: as many as asked, where each method's paper puts them; and they stay in training."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_world import TEACHERS, World, jobs, recipe_of
from test_pruning import made
from test_student_init import student
from test_sweep import job_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoder_cases import CASES, SHAPE
from overproof.cluster.preflight import require_exportable
from overproof.cluster.recipe_checks import warn_for_study
from overproof.config import Masked, Pretrained
from overproof.distill import masked_student
from overproof.distill.distributed_student import DistributedStudentTrainer
from overproof.distill.masked_student import masked, sparse_matrices
from overproof.distill.rounded_training import ROUNDINGS
from overproof.distill.sparsity import DAMPING, sparsify
from overproof.distill.student_trainer import StudentTrainer
from overproof.distill.sweep import sweep
from overproof.distill.trial_job import CONTROL
from overproof.errors import InputError
from overproof.models.hf_directory import layer_names, load_model
from overproof.models.sizes import student_size
from overproof.models.student_config import student_config
from overproof.registry import FAMILIES
from overproof.stage_context import StageContext

METHODS = ("magnitude", "wanda", "sparsegpt")
MEASURES: tuple[dict[str, Any], ...] = ({"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"})
RATE = {"learning_rate": 5e-2, "weight_decay": 0.1, "clip_norm": 1.0}


def section(method: str, **measure: Any) -> Masked:
    return Masked.model_validate({"method": method, **measure})


def correlated(rows: int = 24, columns: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs that hang together and differ in size, and the sum of their x xᵀ."""
    generator = torch.Generator().manual_seed(0)
    weights_RC = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(2048, 32, generator=generator) @ torch.randn(32, columns, generator=generator)
    inputs_NC = (mixed + torch.randn(2048, columns, generator=generator)) * torch.rand(columns, generator=generator)
    return weights_RC, inputs_NC, inputs_NC.T @ inputs_NC


@torch.inference_mode()
def ask(model: PreTrainedModel, batch: dict[str, Tensor]) -> object:
    return model(**batch, **({"use_cache": False} if type(model).__name__.endswith("ForCausalLM") else {}))


def linear_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    stack = model.get_submodule(layer_names(model).layers)
    return {name: each.weight.detach() for name, each in stack.named_modules() if isinstance(each, nn.Linear)}


def share_of_zeros(weights: dict[str, Tensor]) -> float:
    return sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())


@pytest.mark.parametrize("measure", MEASURES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_as_much_is_zero_as_was_asked_for(method: str, measure: dict[str, Any]) -> None:
    weights_RC, _, inputs_CC = correlated(25, 252)  # neither of which a block divides
    zeros_RC = sparsify(section(method, **measure), weights_RC, inputs_CC) == 0
    if "pattern" in measure:
        assert (zeros_RC.view(25, -1, 4).sum(-1) == 2).all()
    elif method == "wanda":
        assert (zeros_RC.sum(1) == round(measure["sparsity"] * 252)).all()
    else:
        assert zeros_RC.sum() == round(measure["sparsity"] * 25 * 252)


@pytest.mark.parametrize("measure", [MEASURES[0], MEASURES[2]], ids=str)
def test_what_knows_more_of_the_inputs_changes_the_outputs_less(measure: dict[str, Any]) -> None:
    weights_RC, inputs_NC, inputs_CC = correlated()

    def lost(method: str) -> float:
        found_RC = sparsify(section(method, **measure), weights_RC, inputs_CC)
        return float(((found_RC - weights_RC) @ inputs_NC.T).square().mean())

    magnitude, wanda, sparsegpt = map(lost, METHODS)
    assert sparsegpt < 0.5 * wanda
    assert wanda < 0.8 * magnitude


def test_magnitude_and_wanda_take_what_their_papers_take() -> None:
    weights_RC = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-8.0, 7.0, 6.0, 5.0]])
    inputs_CC = torch.diag(torch.tensor([100.0, 1.0, 4.0, 0.25]))  # norms 10, 1, 2, 0.5
    found = sparsify(section("magnitude", sparsity=0.5), weights_RC, None)
    assert found.tolist() == [[0, 0, 0, 0], [-8, 7, 6, 5]]
    assert sparsify(section("magnitude", pattern="2:4"), weights_RC, None).tolist() == [[0, 0, 3, 4], [-8, 7, 0, 0]]
    for measure in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        found = sparsify(section("wanda", **measure), weights_RC, inputs_CC)
        assert found.tolist() == [[1, 0, 3, 0], [-8, 0, 6, 0]]


@pytest.mark.parametrize("measure", [MEASURES[0], MEASURES[2]], ids=str)
def test_sparsegpt_is_the_textbooks(measure: dict[str, Any]) -> None:
    """Optimal brain surgeon, one column after the other: the inverse of what is left of H says what each costs and what
    makes up for it. In numpy, with no factor and no blocks.
    """
    weights_RC, _, inputs_CC = correlated(6, 32)
    hessian, left = inputs_CC.double().numpy(), weights_RC.double().numpy().copy()
    hessian = hessian + DAMPING * hessian.diagonal().mean() * np.eye(32)
    inverses = [np.linalg.inv(hessian[c:, c:]) for c in range(32)]
    cost = np.array([1 / inverse[0, 0] for inverse in inverses])
    zeros = np.zeros(left.shape, bool)
    if "sparsity" in measure:
        zeros.flat[np.argsort((left**2 * cost).ravel())[: left.size // 2]] = True
    for column, inverse in enumerate(inverses):
        if "pattern" in measure and column % 4 == 0:
            group = slice(column, column + 4)
            lowest = np.argsort(left[:, group] ** 2 * cost[group], axis=1)[:, :2]
            np.put_along_axis(zeros[:, group], lowest, True, axis=1)
        for row in np.flatnonzero(zeros[:, column]):
            left[row, column:] -= left[row, column] / inverse[0, 0] * inverse[:, 0]
            left[row, column] = 0
    found = sparsify(section("sparsegpt", **measure), weights_RC, inputs_CC).numpy()
    np.testing.assert_array_equal(found == 0, zeros)
    np.testing.assert_allclose(found, left, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_always_zero_go_first() -> None:
    weights_RC, inputs_NC, _ = correlated(8, 64)
    inputs_NC[:, 10:20] = 0
    for method in METHODS[1:]:
        found = sparsify(section(method, sparsity=0.5), weights_RC, inputs_NC.T @ inputs_NC)
        assert torch.isfinite(found).all()
        assert not found[:, 10:20].any()
        assert (found == 0).sum() == 4 * 64


@pytest.mark.parametrize("name", ["llama-3", "phi4", "falcon", "bert", "distilbert", "modernbert", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_models_of_any_linear_layers_are_made_sparse(method: str, name: str) -> None:
    model, batch = made(name)
    before = {place: weight.clone() for place, weight in model.state_dict().items()}
    found = sparse_matrices(section(method, pattern="2:4"), model, lambda: [batch], ask)
    assert len(found) == len(linear_weights(model))
    for weight_RC in found.values():
        assert ((weight_RC.view(len(weight_RC), -1, 4) == 0).sum(-1) == 2).all()
    start = masked(made(name)[0], found)
    for place, weight in start.state_dict().items():
        assert torch.equal(weight, found.get(place, before[place]))


def test_later_layers_see_what_earlier_ones_give_with_their_zeros() -> None:
    model, batch = made("llama-3")
    seen = list[Tensor]()
    sparse_matrices(section("wanda", sparsity=0.5), model, lambda: [batch], ask)
    last = model.get_submodule("model.layers.2.self_attn.q_proj")
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    ask(model, batch)
    (inputs_NC,) = seen
    weight_RC = made("llama-3")[0].get_submodule("model.layers.2.self_attn.q_proj").weight.detach()  # type: ignore[union-attr, operator]
    expected = sparsify(section("wanda", sparsity=0.5), weight_RC, inputs_NC.T @ inputs_NC)  # type: ignore[arg-type]
    assert torch.equal(last.weight, expected)


def masked_context(
    world: World, *names: str, rounding: str | None = None, group: dict[str, Any] | None = None
) -> StageContext:
    asked = {"kind": "masked", "method": "wanda", "sparsity": 0.5, "rows": 16}
    students = [student(asked, name=name, teacher_weight=0.0, rounding=rounding) for name in names]
    settings = {"students": students, "steps": 12, "validate_every": 4, "group": group, **RATE}
    return world.context("sweep", cached=world.artifacts["prepare"], sweep=settings)


def test_zeros_stay_zero_through_training_and_a_restart(text_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with decay and momentum; all starts are the same, a control's too; and a restart changes not a bit."""
    measured = list[int]()
    original = masked_student.sparse_matrices
    monkeypatch.setattr(masked_student, "sparse_matrices", lambda *given: measured.append(1) or original(*given))
    context = masked_context(text_world, "whole", "broken")
    job = job_of(context, "broken")
    whole, broken = StudentTrainer(job_of(context, "whole")), StudentTrainer(job)
    control = StudentTrainer(dataclasses.replace(job_of(context, "whole"), name=CONTROL, distilled=False))
    start = {name: weight.clone() for name, weight in linear_weights(whole.model).items()}
    assert measured == [1]
    assert share_of_zeros(start) == 0.5
    for other in (broken, control):
        for name, weight in linear_weights(other.model).items():
            assert torch.equal(weight, start[name])
    for _ in range(3):
        whole.run_to_validation()
    broken.run_to_validation()
    broken.checkpoint_writer.wait()
    again = StudentTrainer(job)
    assert again.resumed_step == 4
    again.run_to_validation()  # of before
    for _ in range(2):
        again.run_to_validation()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    for name, weight in linear_weights(whole.model).items():
        assert torch.equal(weight == 0, start[name] == 0), name
        assert (weight != start[name]).sum() > 0.4 * weight.numel()


def test_a_student_that_is_rounded_keeps_them_too(text_world: World) -> None:
    trainer = StudentTrainer(job_of(masked_context(text_world, "both", rounding="q4_0"), "both"))
    zeros = {name: weight == 0 for name, weight in linear_weights(trainer.model).items()}
    for _ in range(3):
        trainer.run_to_validation()
    for name, weight in linear_weights(trainer.model).items():
        assert torch.equal(weight == 0, zeros[name])
        assert not any(rounded(weight)[zeros[name]].any() for rounded in ROUNDINGS.values())


def test_compiled_models_keep_them_too() -> None:
    model, batch = made("llama-3")
    student = masked(model, sparse_matrices(section("magnitude", sparsity=0.5), made("llama-3")[0], list, ask))
    zeros = {name: weight == 0 for name, weight in linear_weights(student).items()}
    torch.compile(student, backend="aot_eager")(**batch, labels=batch["input_ids"]).loss.backward()
    for name, module in student.get_submodule("model.layers").named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.weight.grad == 0, zeros[name])


def test_groups_keep_them_too_under_zero_and_after_a_restart(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(folder / "masked_ranks.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder.parent / "train"), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {name: [0, 0] for name in ("stage2", "stage3", "bf16")}  # none came back, and all others moved


@pytest.mark.trial
@pytest.mark.usefixtures("ray_cluster")
def test_a_group_under_ray_writes_a_file_that_has_the_zeros(text_world: World) -> None:
    (job,) = jobs(masked_context(text_world, "one", group={"workers": 2, "zero_stage": 3}))
    trainer = DistributedStudentTrainer()
    trainer.start(job)
    results = [trainer.run_to_validation() for _ in range(3)]
    assert [result["failed"] for result in results] == [None] * 3
    assert share_of_zeros(linear_weights(load_model(Path(job.draft.uri) / job.folder))) == 0.5


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_ends_with_files_that_have_the_zeros(text_world: World) -> None:
    context = masked_context(text_world, "one")
    assert sweep(context)["trials"] == 1
    for folder in ("students/one", "control"):
        assert share_of_zeros(linear_weights(load_model(Path(context.draft.uri) / folder))) == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": 0.0}, r"sparsity: found 0\.0; input should be greater than 0"),
        ({"sparsity": 1.0}, r"sparsity: found 1\.0; input should be less than 1"),
        ({"pattern": "1:4"}, r"pattern: found '1:4'; input should be '2:4'"),
        ({"pattern": "2:4", "sparsity": 0.5}, r"found sparsity 0\.5 and pattern 2:4; expected one of sparsity"),
        ({}, "found neither; expected one of sparsity, such as 0.5, and pattern, '2:4'"),
        ({"sparsity": 0.5, "method": "random"}, "method: found 'random'"),
    ],
)
def test_what_is_no_share_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Masked.parse({"method": "wanda", **changes}, "model")


def test_teachers_that_cannot_be_masked_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    of_four, half = section("wanda", pattern="2:4"), section("wanda", sparsity=0.5)
    words = "kind masked: found layers of a GPT2LMHeadModel, whose matrices are Conv1D or none; expected layers of nn"
    config = {**CASES["gpt2"].model().config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    with pytest.raises(InputError, match=words):
        student_config(config, half, FAMILIES["gpt2"].names)
    folder = CASES["gpt2"].save(tmp_path / "gpt2", CASES["gpt2"].model())
    asked = student({"kind": "masked", "method": "wanda", "sparsity": 0.5})
    recipe = recipe_of(
        "text", train={"model": {"kind": "pretrained", "path": str(folder)}}, sweep={"students": [asked]}
    )
    with pytest.raises(InputError, match=f"student begun: {words}"):
        require_exportable(recipe)
    with pytest.raises(InputError, match=words):
        student_size(half, Pretrained(path=str(folder)), SHAPE)
    with pytest.raises(InputError, match=r"found transformer\.h of a GPT2LMHeadModel"):
        sparse_matrices(half, CASES["gpt2"].model(), list, ask)
    with pytest.raises(InputError, match="pattern 2:4: intermediate_size is 50; expected a multiple of 4, or sparsity"):
        student_config({"hidden_size": 32, "intermediate_size": 50}, of_four, FAMILIES["llama"].names)
    with pytest.raises(InputError, match="pattern 2:4: the number of a matrix's columns is 6"):
        sparsify(of_four, torch.ones(4, 6), torch.eye(6))
    students = [student({"kind": "masked", "method": "wanda", "pattern": "2:4"})]
    odd = TEACHERS["digits"].model_copy(update={"intermediate_size": 50}).model_dump()
    with pytest.raises(InputError, match=r"students\.0\.model\.pattern 2:4: intermediate_size is 50"):
        recipe_of("digits", train={"model": odd}, sweep={"students": students})
    gpt2 = {"kind": "gpt2", "hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2}
    with pytest.raises(InputError, match=r"students\.0\.model\.kind masked: found layers of gpt2"):
        recipe_of("text", train={"model": gpt2}, sweep={"students": students})


def test_its_size_is_the_teachers_and_a_plan_says_that_it_is_for_study(tmp_path: Path) -> None:
    folder = CASES["llama-3"].save(tmp_path / "teacher", CASES["llama-3"].model())
    teacher = Pretrained(path=str(folder))
    shape = dataclasses.replace(SHAPE, outputs=0)
    whole = student_size(teacher, teacher, shape)
    assert student_size(section("wanda", sparsity=0.5), teacher, shape).parameters == whole.parameters
    described = [student({"kind": "masked", "method": "wanda", "sparsity": 0.5})]
    [warning] = warn_for_study(recipe_of("digits", sweep={"students": described}))
    assert (warning.about, warning.state) == ("student begun", "warning")
    assert "experimental, for study: its files are no smaller and no faster" in warning.text
