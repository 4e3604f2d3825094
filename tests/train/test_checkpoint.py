"""Checkpoints: committed last, verified first, kept by policy; every way a file can go bad."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from overproof import artifact_cache
from overproof.config import CheckpointPolicy
from overproof.errors import InputError
from overproof.files import filesystem
from overproof.stage_context import TrainingResumed
from overproof.train.checkpoint import (
    CHECKPOINT_MANIFEST,
    LEDGER,
    Checkpoint,
    Checkpoints,
    Damage,
    DamageKind,
    config_differences,
    read_checksummed,
    select_retained,
)
from overproof.train.checkpoint_writer import AsyncCheckpointWriter, RankLostError

CONFIG = {"train": {"learning_rate": 0.003, "steps": 30}}
PARENTS = {"prepare": "a" * 64}


def checkpoints(folder: Path | str, **policy: int) -> Checkpoints:
    return Checkpoints(str(folder), "f" * 64, CONFIG, PARENTS, CheckpointPolicy(**policy))


def state_of(rank: int, step: int) -> dict[str, Any]:
    return {"tensor": torch.arange(2000.0) + 1000 * step + rank, "step": step}


def save(found: Checkpoints, step: int, attempt: str = "aaaa0000", world: int = 2, score: float | None = None) -> None:
    """What the ranks of a group do at a step."""
    writers = [AsyncCheckpointWriter(found, attempt, rank, world) for rank in reversed(range(world))]
    for writer in writers:
        extra = {"curve.jsonl": b'{"step": 1}\n'} if writer.rank == 0 else {}
        writer.save(step, score, lambda write, s=writer: write(f"rank{s.rank}.pt", state_of(s.rank, step)), extra)
    errors = []
    for writer in writers:  # all of them: in a process of its own each rank tidies up after itself
        try:
            writer.wait()
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@pytest.fixture
def three(tmp_path: Path) -> Checkpoints:
    found = checkpoints(tmp_path / "work", keep_last=3)
    found.claim_folder()
    for step in (10, 20, 30):
        save(found, step)
    return found


def refuse(event: TrainingResumed) -> None:
    raise AssertionError(f"nothing was to be reported: {event}")


def test_nothing_was_ever_committed(tmp_path: Path) -> None:
    found = checkpoints(tmp_path / "work")
    found.claim_folder()
    assert found.newest_sound(refuse) is None
    assert found.committed_step() == 0


def test_the_newest_is_what_was_saved(three: Checkpoints) -> None:
    kept = three.newest_sound(refuse)
    assert kept
    assert (kept.step, kept.world, three.committed_step()) == (30, 2, 30)
    assert sorted(kept.files) == ["curve.jsonl", "rank0.pt", "rank1.pt"]
    with kept.local() as folder:
        for rank in range(2):
            read = torch.load(folder / f"rank{rank}.pt")
            assert torch.equal(read["tensor"], state_of(rank, 30)["tensor"])


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path) -> None:
    found = checkpoints(tmp_path / "work")
    found.claim_folder()
    writer = AsyncCheckpointWriter(found, "aaaa0000", 0, 1)
    state = {"weights": torch.zeros(1000), "scale": [torch.ones(2)]}
    for step in (1, 2):  # the second copy goes into the memory of the first
        writer.save(step, None, lambda write: write("s.pt", state), {})
        state["weights"] += 1
        writer.wait()
        kept = found.newest_sound(refuse)
        assert kept
        with kept.local() as folder:
            assert torch.load(folder / "s.pt")["weights"].unique().tolist() == [step - 1.0]


def test_tensors_that_are_one_stay_one(tmp_path: Path) -> None:
    found = checkpoints(tmp_path / "work")
    found.claim_folder()
    writer, tied = AsyncCheckpointWriter(found, "aaaa0000", 0, 1), torch.ones(50_000)
    writer.save(1, None, lambda write: write("s.pt", {"head": tied, "embedding": tied}), {})
    writer.wait()
    assert found.all_committed()[0].files["s.pt"].size_bytes < 1.2 * 50_000 * 4


def test_a_rank_that_never_came_leaves_no_checkpoint(three: Checkpoints) -> None:
    writer = AsyncCheckpointWriter(three, "bbbb0000", 1, 2)
    writer.save(40, None, lambda write: write("rank1.pt", state_of(1, 40)), {})
    writer.wait()
    resumed: list[TrainingResumed] = []
    kept = three.newest_sound(resumed.append)
    assert kept
    assert kept.step == 30
    text = "checkpoint 00000040-bbbb0000: was never finished; going on from step 30"
    assert resumed == [TrainingResumed(text, 30)]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_rank_that_is_gone_ends_the_wait_and_is_named(three: Checkpoints, missing: int) -> None:
    """The others have written their parts; rank 0 waits for the list that never comes, and not for ever."""
    for rank in {1, 2} - {missing}:
        other = AsyncCheckpointWriter(three, "bbbb0000", rank, 3)
        other.save(40, None, lambda write, r=rank: write(f"rank{r}.pt", state_of(r, 40)), {})  # type: ignore[misc]
        other.wait()
    writer = AsyncCheckpointWriter(three, "bbbb0000", 0, 3, rank_timeout_s=0.01)
    writer.save(40, None, lambda write: write("rank0.pt", state_of(0, 40)), {})
    if missing == 0:  # rank 0 itself is not gone: all three are there
        writer.wait()
        assert three.committed_step() == 40
        return
    with pytest.raises(RankLostError) as lost:
        writer.wait()
    text = str(lost.value)
    assert f"rank {missing} of 3 has not written its part (rank-{missing:05d}.json is missing)" in text
    assert "the checkpoint of step 40 was not committed" in text
    assert "training can go on from step 30" in text
    assert three.committed_step() == 30
    resumed: list[TrainingResumed] = []
    found = three.newest_sound(resumed.append)
    assert found
    assert (found.step, [event.step for event in resumed]) == (30, [30])


def test_a_torn_list_of_a_rank_counts_as_none(three: Checkpoints) -> None:
    other = AsyncCheckpointWriter(three, "bbbb0000", 1, 2)
    other.save(40, None, lambda write: write("rank1.pt", state_of(1, 40)), {})
    other.wait()
    listing = next(Path(three.uri).glob("*bbbb0000")) / "rank-00001.json"
    listing.write_bytes(listing.read_bytes()[:-5])
    writer = AsyncCheckpointWriter(three, "bbbb0000", 0, 2, rank_timeout_s=0.01)
    writer.save(40, None, lambda write: write("rank0.pt", state_of(0, 40)), {})
    with pytest.raises(RankLostError, match=r"rank 1 of 2 .*rank-00001\.json is not what was written"):
        writer.wait()


def test_damage_is_known_by_its_kind(three: Checkpoints) -> None:
    newest = three.all_committed()[-1]
    folder = Path(newest.uri)
    assert newest.find_damage() is None
    flip(folder / "rank1.pt")
    assert newest.find_damage().kind is DamageKind.CHANGED  # type: ignore[union-attr]
    (folder / "rank1.pt").unlink()
    assert newest.find_damage().kind is DamageKind.MISSING  # type: ignore[union-attr]
    files, root = filesystem(newest.uri)
    for path, kind in {"none.json": DamageKind.MISSING, "curve.jsonl": DamageKind.CHANGED}.items():
        found = read_checksummed(files, f"{root}/{path}")
        assert isinstance(found, Damage)
        assert found.kind is kind


def test_attempts_do_not_mix(three: Checkpoints) -> None:
    other = AsyncCheckpointWriter(three, "bbbb0000", 1, 2)
    other.save(40, None, lambda write: write("rank1.pt", state_of(1, -1)), {})
    other.wait()
    save(three, 40, "cccc0000")
    kept = three.newest_sound(refuse)
    assert kept
    assert kept.uri.endswith("00000040-cccc0000")
    assert not list(Path(three.uri).glob("*bbbb0000"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BREAK: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (lambda at: flip(at / "rank1.pt"), "rank1.pt was changed: its sha256 is"),
    "cut": (lambda at: (at / "rank0.pt").write_bytes((at / "rank0.pt").read_bytes()[:-1]), "rank0.pt has"),
    "gone": (lambda at: (at / "rank1.pt").unlink(), "rank1.pt is missing"),
    "no manifest": (lambda at: (at / CHECKPOINT_MANIFEST).unlink(), f"{CHECKPOINT_MANIFEST} is missing"),
    "flipped manifest": (lambda at: flip(at / CHECKPOINT_MANIFEST), f"{CHECKPOINT_MANIFEST} "),
    "empty manifest": (
        lambda at: (at / CHECKPOINT_MANIFEST).write_bytes(b""),
        f"{CHECKPOINT_MANIFEST} is not what was written",
    ),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_bad_one_is_said_and_the_one_before_is_used(three: Checkpoints, how: str) -> None:
    damage, text = BREAK[how]
    damage(next(Path(three.uri).glob("00000030-*")))
    resumed: list[TrainingResumed] = []
    kept = three.newest_sound(resumed.append)
    assert kept
    assert kept.step == 20
    assert [event.step for event in resumed] == [20]
    assert text in resumed[0].text


def test_a_bad_one_goes_when_training_has_passed_it(three: Checkpoints) -> None:
    flip(next(Path(three.uri).glob("00000030-*")) / "rank1.pt")
    save(three, 25, "bbbb0000")
    assert [kept.step for kept in three.all_committed()] == [10, 20, 25]


def test_none_left_where_there_was_one_is_an_error(three: Checkpoints) -> None:
    for folder in Path(three.uri).glob("0*"):
        flip(folder / "rank0.pt")
    with pytest.raises(InputError, match=r"reached step 30, and no good checkpoint is left: .*rank0\.pt was"):
        three.newest_sound(refuse)


def test_a_folder_emptied_by_hand_is_an_error(three: Checkpoints) -> None:
    for folder in Path(three.uri).glob("0*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with pytest.raises(InputError, match="none was found"):
        three.newest_sound(refuse)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_the_ledger_is_not_needed_to_find_a_good_one(three: Checkpoints, damage: Callable[[Path], None]) -> None:
    damage(Path(three.uri) / LEDGER)
    three.claim_folder()
    kept = three.newest_sound(refuse)
    assert kept
    assert kept.step == 30


def test_without_ledger_a_bad_one_is_still_no_fresh_start(three: Checkpoints) -> None:
    (Path(three.uri) / LEDGER).unlink()
    for folder in Path(three.uri).glob("0*"):
        flip(folder / "rank0.pt")
    three.claim_folder()
    with pytest.raises(InputError, match="no good checkpoint is left"):
        three.newest_sound(refuse)


@tries(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_goes_unseen(three: Checkpoints, data: st.DataObject) -> None:
    """Whatever happens to one file of the newest checkpoint, what is read back was written."""
    newest = max(Path(three.uri).glob("00000030-*"))
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    before = file.read_bytes()
    after = bytearray(before)
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "zero"]))
    place = data.draw(st.integers(0, len(before) - 1))
    match kind:
        case "flip":
            after[place] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del after[place:]
        case "grow":
            after += b"\0" * (place + 1)
        case "zero":
            after[place : place + 512] = bytes(len(after[place : place + 512]))
    try:
        file.write_bytes(after)
        kept = three.newest_sound([].append)
        assert kept
        assert kept.step == 20 or file.name not in kept.files or bytes(after) == before
    finally:
        file.write_bytes(before)


def test_another_recipe_is_refused_with_the_difference(three: Checkpoints) -> None:
    other = replace(
        three,
        fingerprint="e" * 64,
        config={"train": {"learning_rate": 0.001, "steps": 30}},
        parents={"prepare": "b" * 64},
    )
    with pytest.raises(InputError) as refused:
        other.claim_folder()
    said = str(refused.value)
    assert "at step 30" in said
    assert "train.learning_rate 0.003, now 0.001" in said
    assert "prepare aaaaaaaa, now bbbbbbbb" in said
    assert three.newest_sound(refuse) is not None


def test_another_recipe_may_take_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    checkpoints(tmp_path / "work").claim_folder()
    other = replace(checkpoints(tmp_path / "work"), fingerprint="e" * 64)
    other.claim_folder()
    assert other.newest_sound(refuse) is None


def test_differences_name_every_field() -> None:
    before, now = {"a": {"b": 1, "c": [1, 2]}, "d": None}, {"a": {"b": 2, "c": [1, 2]}, "e": "x"}
    assert list(config_differences(before, now)) == ["a.b 1, now 2", 'e null, now "x"']


def kept_at(step: int, score: float | None) -> Checkpoint:
    return Checkpoint(f"{step}", step, 1, score, {})


def test_the_last_and_the_best_are_kept() -> None:
    scores = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.5, 60: 2.2}
    kept = select_retained(
        [kept_at(step, score) for step, score in scores.items()], CheckpointPolicy(keep_last=2, keep_best=2)
    )
    assert sorted(each.step for each in kept) == [20, 40, 50, 60]


def test_old_ones_go(tmp_path: Path) -> None:
    found = checkpoints(tmp_path / "work", keep_last=2, keep_best=1)
    found.claim_folder()
    for step, score in [(1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0), (5, 5.0)]:
        save(found, step, score=score)
    assert [kept.step for kept in found.all_committed()] == [2, 4, 5]
    best = found.best()
    assert best
    assert best.step == 2


def test_on_an_object_store(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(artifact_cache, "cache_root", lambda: tmp_path)
    uri = s3_uri.replace("/store?", "/store/tiny/train.work?")
    found = checkpoints(uri)
    found.claim_folder()
    for step in (10, 20):
        save(found, step)
    files, root = filesystem(found.directory(20, "aaaa0000"))
    newest = found.all_committed()[-1]
    assert newest.find_damage(["rank1.pt"]) is None
    with newest.local(["rank1.pt"]) as folder:  # each rank fetches the files of its own part
        assert [path.name for path in folder.iterdir()] == ["rank1.pt"]
    with files.open_input_stream(f"{root}/rank0.pt") as stream:
        changed = stream.read()[:-1] + b"?"
    with files.open_output_stream(f"{root}/rank0.pt") as stream:
        stream.write(changed)
    assert newest.find_damage(["rank1.pt"]) is None
    damage = newest.find_damage(["rank0.pt"])
    assert damage
    assert damage.kind is DamageKind.CHANGED
    with files.open_output_stream(f"{root}/rank0.pt") as stream:
        stream.write(b"torn")
    resumed: list[TrainingResumed] = []
    kept = found.newest_sound(resumed.append)
    assert kept
    assert kept.step == 10
    assert "rank0.pt has 4 bytes" in resumed[0].text
    with kept.local() as folder:
        assert torch.load(folder / "rank1.pt")["step"] == 10


FULL = """
import resource
import signal
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = checkpoints({folder!r})
found.claim_folder()
save(found, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save(found, 20)
"""


def test_storage_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the kernel refuses the write half-way."""
    code = FULL.format(here=str(Path(__file__).parent), folder=str(tmp_path / "work"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError" in last
    assert "the checkpoint of step 20 could not be written" in last
    assert "training goes on from step 10" in last
    found = checkpoints(tmp_path / "work")
    kept = found.newest_sound(refuse)
    assert kept
    assert kept.step == 10
    assert len(list(Path(found.uri).glob("0*"))) == 1
