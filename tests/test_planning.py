"""`overproof plan` as a person meets it: what it prints, what it refuses, and that it leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finished import RECIPES
from made_tokenizers import byte_level
from overproof.cli.main import main
from overproof.cluster.recipe_checks import check_first_comparison, check_gate, check_learning_rates
from overproof.config import load_recipe

REPOSITORY = Path(__file__).parents[1]
DIGITS, TEXT = str(RECIPES / "digits.yaml"), str(RECIPES / "stdlib-lm.yaml")


def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], *argv: str, recipe: str = DIGITS) -> tuple[int, str, str]:
    code = main(["plan", recipe, "--set", f"store={tmp_path / 'store'}", *argv])
    captured = capsys.readouterr()
    assert not (tmp_path / "store").exists()
    return code, captured.out, captured.err


def findings(printed: str) -> dict[str, tuple[str, str]]:
    """State and text of each check; a text may go on for several lines."""
    lines = printed.splitlines()
    found: dict[str, tuple[str, str]] = {}
    about = ""
    for line in lines[lines.index("", lines.index("") + 1) :]:
        check = re.match(r"(\w+) +(ok|warning|refused) +(.*)", line)
        if check:
            about = check[1]
            found[about] = (check[2], check[3].strip())
        elif about:
            found[about] = (found[about][0], f"{found[about][1]} {line.strip()}")
    return found


def test_the_plan_of_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(tmp_path, capsys, "--tokens-per-s", "1000", recipe=TEXT)
    assert code == 0
    assert "teacher: 1,721,664 parameters (with all 2,048 entries of the vocabulary); 2 workers, fp32, ZeRO 2" in out
    assert "students: narrow 688,768, deep " in " ".join(out.split())
    assert (
        "targets of the teacher, 32 likeliest outputs: 118.2 bytes a token, 266,240 tokens, 31.5 MB; "
        "the teacher looks for about 89 s" in (" ".join(out.split()))
    )
    rows = [line for line in out.splitlines() if re.match(r"[0-3] ", line)]
    assert len(rows) == 4
    assert [row for row in rows if "this recipe" in row] == [rows[2]]
    assert re.search(r"6\.89 MB +6\.89 MB +10\.3 MB", rows[2])
    found = findings(out)
    assert set(found) == {"data", "train", "cache", "sweep", "serve", "together", "storage", "memory", "upload", "time"}
    assert found["time"] == ("ok", "450,560 tokens in 440 steps at 1,000 tokens/s (as given): 8 min")
    assert found["train"][1].startswith("2 workers + 1 reader: 2 x 1 + 1 = 3 of ")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (
            "{kind: sampled, k: 10, draws: 20}",
            "10 likeliest and 20 drawn outputs: 115.5 bytes a token, 266,240 tokens, 30.7 MB",
        ),
        ("{kind: dense}", "whole distribution: 4,104.2 bytes a token, 266,240 tokens, 1.09 GB"),
    ],
)
def test_the_plan_of_each_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, words: str) -> None:
    code, out, _ = plan(tmp_path, capsys, "--set", f"cache.scheme={scheme}", recipe=TEXT)
    assert code == 0
    assert f"targets of the teacher, {words}" in " ".join(out.split())


def test_a_teacher_that_runs_beside_a_trial_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = ("--set", "sweep.students.0.teacher=live", "--set", "sweep.students.2.states={weight: 1.0}")
    code, out, _ = plan(tmp_path, capsys, *live, recipe=TEXT)
    assert code == 0
    assert (
        "the teacher runs beside narrow, wide: each of these trials also holds its weights, 6.89 MB, and at each step "
        "its logits, 8.39 MB" in " ".join(out.split())
    )
    _, out, _ = plan(tmp_path, capsys, recipe=TEXT)
    assert "runs beside" not in out


def test_the_plan_of_text_that_the_teacher_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("--set", "generate={prompt_tokens: 33, rows: 2080}", "--tokens-per-s", "1000", "--set", "tune={}")
    shape = {"hidden_size": 64, "intermediate_size": 96, "layers": 1, "heads": 2, "kv_heads": 2}
    students: list[dict[str, Any]] = [{"name": "one", "model": {"kind": "llama", **shape}, "text": "teacher"}]
    code, out, _ = plan(tmp_path, capsys, *changes, "--set", f"sweep.students={json.dumps(students)}", recipe=TEXT)
    assert code == 0
    assert "generate to do 2,080 rows from 33 tokens on, temperature 1" in " ".join(out.split())
    assert (
        "text of the teacher: 2,080 rows, 199,680 tokens to be written, 553 kB; the teacher writes for about 4 min"
        in " ".join(out.split())
    )
    assert "targets of the teacher, 32 likeliest outputs: 118.2 bytes a token, 266,240 tokens" in " ".join(out.split())
    assert findings(out)["generate"][1].startswith("2 actors + 1 reader: 2 x 1 + 1 = 3 of ")
    students[0]["teacher_weight"] = 0.0
    code, out, _ = plan(tmp_path, capsys, *changes, "--set", f"sweep.students={json.dumps(students)}", recipe=TEXT)
    assert code == 0
    assert "targets of the teacher" not in " ".join(out.split())
    assert "cache" not in findings(out)


def test_offload_says_what_lies_in_the_cpus_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("--set", "train.offload=optimizer", "--set", "train.gpus_per_worker=1", "--set", "train.zero_stage=2")
    code, out, _ = plan(tmp_path, capsys, *changes, "--cluster", str(REPOSITORY / "cluster.yaml"))
    assert code == 0
    assert "in CPU memory" in out
    assert re.search(r"ZeRO .* GPU ", out)


def test_the_cluster_that_a_file_may_grow_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(REPOSITORY / "cluster.yaml")
    gpus = ("--set", "train.gpus_per_worker=1", "--set", "train.workers=8", "--cluster", file)
    code, out, _ = plan(tmp_path, capsys, *gpus)
    assert code == 0
    found = findings(out)
    assert "8 x 1 = 8 of 8 GPUs, on 8 nodes or more" in found["train"][1]
    assert found["storage"][0] == "warning"
    assert "on 15 nodes it must be a folder that all of them share" in found["storage"][1]
    assert "memory" not in found
    code, out, err = plan(tmp_path, capsys, *gpus, "--set", "train.gpus_per_worker=2")
    assert code == 2
    assert findings(out)["train"][0] == "refused"
    assert "train: 2 workers + 1 reader" not in err
    assert "8 x 2 = 16 GPUs at the same time" in err
    assert "could never start" in err


def test_every_refusal_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = {
        "cluster_name": "small", "max_workers": 4, "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0},
            "small": {"resources": {"CPU": 4}, "min_workers": 0, "max_workers": 4},
        },
    }  # fmt: skip
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster))
    large = ("--set", "train.cpus_per_worker=8", "--set", "sweep.cpus_per_trial=5", "--cluster", str(file))
    code, out, err = plan(tmp_path, capsys, *large)
    assert code == 2
    assert "train: 2 workers + 1 reader need 2 x 8 + 1 = 17 CPUs" in err
    assert "sweep: 1 to 2 trials: each bundle of 5 CPUs must fit one node" in err
    assert "4 x 0 on small (4 CPUs)" in err
    assert {about for about, (state, _) in findings(out).items() if state == "refused"} == {"train", "sweep"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--tokens-per-s", "10"), "give --rows-per-s"),
        (("--rows-per-s", "0"), "expected a rate above 0"),
        (("--rows-per-s", "nan"), "expected a rate above 0"),
        (("--cluster", "no-such-file.yaml"), "No such file"),
    ],
)
def test_questions_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    code, _, err = plan(tmp_path, capsys, *argv)
    assert code == 2
    assert words in err


def test_a_store_that_cannot_be_reached_ends_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = "store=s3://bucket/store?scheme=http&endpoint_override=127.0.0.1:1&region=us-east-1"
    code, _, err = plan(tmp_path, capsys, "--set", nowhere)
    assert code == 2
    assert err.startswith("overproof: storage: s3://bucket/store")
    assert "Traceback" not in err


def test_a_pretrained_teacher_is_sized_by_its_headers_and_torch_stays_out(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=640, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    (tmp_path / "model" / "tokenizer.json").write_text(byte_level())
    change = json.dumps({"kind": "pretrained", "path": str(tmp_path / "model")})
    code = (
        "import sys; from overproof.cli.main import main\n"
        f"assert main(['plan', {TEXT!r}, '--set', {'train.model=' + change!r}, '--set', 'store={tmp_path}/s']) == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"teacher: {sum(p.numel() for p in model.parameters()):,} parameters" in done.stdout


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_recipe_of_ours_lets_any_quality_pass(path: Path) -> None:
    assert not list(check_gate(load_recipe(path)))
    assert not list(check_learning_rates(load_recipe(path)))


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        (("train.learning_rate=3",), ["train.learning_rate"]),
        (("train.learning_rate=0.05", "sweep.learning_rate=5.0"), ["sweep.learning_rate"]),
        (("train.learning_rate=0.05", "train.model={kind: pretrained, path: x}"), ["train.learning_rate"]),
        (("train.learning_rate=3", "train.model={kind: pretrained, path: x}", "train.steps=0"), []),
        (("tune.space.learning_rate={kind: choice, values: [0.001, 1.0]}",), ["tune.space.learning_rate"]),
        (
            ("tune={search: {kind: random, trials: 2}, space: {learning_rate: {kind: uniform, low: 0.1, high: 1.0}}}",),
            ["tune.space.learning_rate"],
        ),
    ],
)
def test_rates_at_which_nothing_is_learnt_are_warned_of(changes: tuple[str, ...], warned: list[str]) -> None:
    recipe = load_recipe(RECIPES / "chat.yaml", changes)
    assert [finding.about for finding in check_learning_rates(recipe)] == warned


@pytest.mark.parametrize(
    ("scheduler", "warned"),
    [
        ("{kind: asha, grace_steps: 60}", ["tune.scheduler.grace_steps"]),
        ("{kind: median, grace_steps: 59}", []),
        ("{kind: hyperband}", []),
        ("{kind: none}", []),
    ],
)
def test_trials_that_are_compared_at_their_end_alone_are_warned_of(scheduler: str, warned: list[str]) -> None:
    recipe = load_recipe(RECIPES / "chat.yaml", ("sweep.steps=60", "cache.rows=null", f"tune.scheduler={scheduler}"))
    assert [finding.about for finding in check_first_comparison(recipe)] == warned


def test_a_gate_that_lets_any_quality_pass_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = "gate.rules=[{kind: regression, against: student, at_most: 0.02}, {kind: smaller, at_least: 4}]"
    code, out, _ = plan(tmp_path, capsys, "--set", alone)
    assert code == 0
    state, text = findings(out)["gate"]
    assert state == "warning"
    assert "no rule holds a file's accuracy close to the teacher's" in text
    assert "{kind: keep, against: teacher, at_least: 0.97}" in text
    _, out, _ = plan(tmp_path, capsys)
    assert "gate" not in findings(out)
    # A run says so before it does anything: here before it finds that its data are missing.
    missing = f"data.source={{kind: folder, path: {tmp_path / 'none'}}}"
    assert main(["run", DIGITS, "--set", f"store={tmp_path / 'store'}", "--set", alone, "--set", missing]) == 2
    captured = capsys.readouterr()
    assert "! gate: no rule holds a file's accuracy" in captured.out
