"""The command line. Exit codes: 0 done, 1 the gate refused or nothing fits, 2 bad input, 130 stopped with Ctrl-C,
143 with SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from overproof.cli import verbs
from overproof.cli.termination import sigterm_as_interrupt
from overproof.config import schema_docs
from overproof.errors import GateRefused, InputError, suggest_name

SIGPIPE_CODE = 141
DEMO_RECIPE = Path(__file__).parents[3] / "jobs/recipes/stdlib-lm.yaml"
Run = Callable[[argparse.Namespace], int]
Add = Callable[..., argparse.ArgumentParser]  # a verb: its name, function, help, and the section that its help lists
# Which section of the recipe each stage reads: its fields are the stage's help.
STAGE_VERBS = {
    "prepare": ("data", "clean, split, tokenise and shard the data"),
    "train": ("train", "train the teacher with DeepSpeed ZeRO"),
    "generate": ("generate", "let the teacher write the text that students read"),
    "cache": ("cache", "compute the teacher's targets once"),
    "sweep": ("sweep", "distil students, and a control without the teacher"),
    "compress": ("compress", "export and quantise the students that are kept, and print one table of every file"),
    "evaluate": ("evaluate", "measure every exported file"),
    "gate": ("gate", "judge the measurements by the recipe's policy"),
    "report": ("name", "draw the picture and the HTML report"),
    "package": ("name", "pack the file that passed, with its proof"),
    "speculate": ("speculate", "pack the teacher with that file as its draft, if its text then comes sooner"),
}

OTHER_VERBS: dict[str, Run] = {"report": verbs.report, "compress": verbs.compress}  # than to run until a stage

EXAMPLES = {
    "shrink": (
        "overproof shrink MODEL --data texts/ --max-mb 100 --keep 0.95     a Hugging Face directory, and texts",
        "overproof shrink --data table.csv --label price --max-mb 0.5      no model: a teacher is trained",
    ),
    "run": (
        "overproof run jobs/recipes/digits.yaml",
        "overproof run jobs/recipes/digits.yaml --set train.steps=200      change a field, and what follows from it",
        "overproof run jobs/recipes/digits.yaml --until sweep              the later stages another time",
    ),
    "plan": (
        "overproof plan jobs/recipes/digits.yaml",
        "overproof plan jobs/recipes/stdlib-lm.yaml --cluster cluster.yaml --tokens-per-s 20000",
    ),
    "pick": (
        "overproof pick jobs/recipes/digits.yaml --max-mb 0.1 --max-p95-ms 5",
        "overproof pick jobs/recipes/digits.yaml --min-quality 0.95",
    ),
    "completion": ('eval "$(overproof completion bash)"      in ~/.bashrc',),
    "show": ("overproof show digits/package     the newest", "overproof show digits/train-1a2b3c4d --json"),
    "gc": (
        "overproof gc                      what may go, and its size",
        "overproof gc --yes                delete it",
    ),
    "export": ("overproof export digits/package digits.tar",),
    "import": ("overproof import digits.tar --store /shared/store",),
    "serve": (
        "overproof serve digits/package --set port=8001",
        "overproof serve digits/package --set host=0.0.0.0 --set trust.keys=team.pub",
    ),
    "up": ('eval "$(overproof up)"        start it, and have this shell use it',),
    "down": ('eval "$(overproof down)"      end it, and have this shell forget it',),
    "deploy": ("overproof deploy digits/package", "overproof deploy digits/package --canary --set canary.share=0.1"),
}


class _FieldsHelp(argparse.Action):
    """Prints the recipe fields of a section, and exits."""

    def __init__(self, section: str, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)
        self._section = section

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(schema_docs.describe_fields(self._section))
        parser.exit()


class _WarningLines(logging.Handler):
    """Warnings of the package, each on a line of standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"overproof: warning: {record.getMessage()}", file=sys.stderr)


WARNINGS = _WarningLines(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    logging.getLogger("overproof").addHandler(WARNINGS)
    with sigterm_as_interrupt() as interrupted:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        except BrokenPipeError:  # whoever reads has seen enough, as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return SIGPIPE_CODE
        except InputError as error:
            print(f"overproof: {error}", file=sys.stderr)
            return 2
        except GateRefused as refused:
            print(f"overproof: {refused}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("overproof: stopped; finished stages stay, run the same command to go on", file=sys.stderr)
            return interrupted()


def _run(argv: Sequence[str]) -> int:
    try:
        options = parse_arguments(argv)
        return int(options.run(options))
    finally:
        sys.stdout.flush()  # here, where a reader that has gone can be told from a fault, also after --help


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's options, and in ``run`` the function that takes them.

    Raises:
        InputError: there is no such verb or option.
        SystemExit: help was asked for, or an option is malformed or lacks.
    """
    parser, verbs_by_name = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in verbs_by_name:
        near = suggest_name(argv[0], verbs_by_name)
        raise InputError(f"{argv[0]}: no such verb{near}; expected one that `overproof --help` lists")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"{argv[0]}: unknown {' '.join(unknown)}; {_why_unknown(options, unknown)}")
    return options


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The whole command line, and the parser of each verb."""
    parser = argparse.ArgumentParser(prog="overproof", description="From sharded data to a small model you can trust.")
    names = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Run, text: str, section: str | None = None) -> argparse.ArgumentParser:
        examples = "".join(f"\n  {line}" for line in EXAMPLES.get(name, ()))
        added = names.add_parser(
            name, help=text, description=text, epilog=examples and f"examples:{examples}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(run=run)
        if section is not None:
            added.add_argument(
                "--help-fields", action=_FieldsHelp, section=section, help="list what --set takes, and exit"
            )
        return added

    _add_shrink_verbs(add)
    _add_recipe_verbs(add)
    _add_store_verbs(add)
    _add_serving_verbs(add)
    completion = add("completion", _print_completion, "print what has a shell complete verbs, flags and files")
    completion.add_argument("shell", choices=("bash", "zsh"))
    return parser, names.choices


def _print_completion(options: argparse.Namespace) -> int:
    import shtab

    parser, verbs_by_name = build_parser()
    for verb in verbs_by_name.values():
        for action in verb._actions:  # argparse lists them nowhere else
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
    return 0


def _why_unknown(options: argparse.Namespace, unknown: Sequence[str]) -> str:
    """What to do about words that no option takes."""
    last = next((each for each in reversed(getattr(options, "set", [])) if any(mark in each for mark in "{[")), None)
    if last is not None and not unknown[0].startswith("-"):
        return f"expected values with blanks or braces in single quotes: --set '{' '.join([last, *unknown])}'"
    return f"`overproof {options.verb} --help` lists what there is"


def _add_shrink_verbs(add: Add) -> None:
    for name, run, text in (
        ("shrink", verbs.shrink, "from your data, and your model where you have one, to a smaller one that is proven"),
        ("init", verbs.init, "write the recipe that `shrink` would run, and stop"),
    ):
        verb = add(name, run, text)
        verb.add_argument("model", nargs="?", default="-", metavar="MODEL",
                          help="Hugging Face directory of the teacher; - or none: one is trained")  # fmt: skip
        verb.add_argument("--data", required=True, metavar="DATA", help="file or folder, or a URI")
        verb.add_argument("--task", metavar="KIND", help="where more than one fits: such as tabular_regression")
        verb.add_argument("--max-mb", type=float, metavar="MB", help="file size at most")
        verb.add_argument("--max-p95-ms", type=float, metavar="MS", help="latency of 95 in 100 requests at most")
        verb.add_argument("--keep", type=float, default=0.97, metavar="SHARE",
                          help="of the teacher's quality, kept with certainty (default: 0.97)")  # fmt: skip
        verb.add_argument("--finetune", type=int, metavar="STEPS", help="train MODEL on the data before it teaches")
        verb.add_argument("--max-minutes", type=float, metavar="M", help="of the whole run, about: fewer steps fit")
        verb.add_argument("--label", metavar="COLUMN", help="column to predict")
        verb.add_argument("--text", metavar="COLUMN", help="column of the text")
        verb.add_argument("--image", metavar="COLUMN", help="column of the images")
        verb.add_argument("--pattern", action="append", default=[], metavar="GLOB",
                          help="which files are documents, such as '*.md'; may be given several times")  # fmt: skip
        verb.add_argument("--image-size", type=int, metavar="PIXELS", help="edges that images are scaled to")
        verb.add_argument("--name", help="of the run and its recipe (default: after the model or the data)")
        verb.add_argument("--out", type=Path, metavar="FILE", help="where the recipe goes (default: NAME.yaml)")
        verb.add_argument("--set", action="append", default=[], metavar="a.b=c", help="write a recipe field otherwise")


def _add_recipe_verbs(add: Add) -> None:
    demo = add("demo", verbs.demo, "run the whole loop on one machine and ask the served model", "")
    _add_recipe(demo, nargs="?", default=DEMO_RECIPE, help="recipe (default: stdlib-lm)")
    demo.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    run = add("run", verbs.run_stages, "run every stage that is not done yet", "")
    _add_recipe(run)
    run.add_argument("--until", metavar="STAGE", help=f"last stage to run (default: all): {', '.join(STAGE_VERBS)}")
    plan = add("plan", verbs.plan, "say what would run, what it holds and asks for, and whether it can ever start", "")
    _add_recipe(plan)
    plan.add_argument("--cluster", type=Path, metavar="FILE", help="plan for what this `ray up` file may grow to")
    plan.add_argument("--tokens-per-s", type=float, metavar="N", help="throughput, for the hours of a language model")
    plan.add_argument(
        "--rows-per-s", type=float, metavar="N", help="throughput in rows (images, rows of a table) instead"
    )
    prove = add("prove", verbs.prove, "train twice, once with workers killed or moved, and compare", "")
    prove.add_argument("what", choices=("resume", "elastic"), help="workers killed; or nodes that die and join")
    _add_recipe(prove)
    prove.add_argument("--kills", type=int, default=3, metavar="N", help="workers killed by `resume` (default: 3)")
    prove.add_argument("--seed", type=int, default=0, metavar="N", help="of the steps at which it happens")
    for name, (section, text) in STAGE_VERBS.items():
        function = OTHER_VERBS.get(name, verbs.run_stages)
        stage = add(name, function, f"{text} (and the stages it needs, where they are not done)", section)
        _add_recipe(stage, help="recipe in YAML, or a sweep's id" if name == "report" else "recipe in YAML")
        stage.set_defaults(until=name)
        if name == "report":
            _add_store(stage, "where the sweep lies: folder or URI (default: store)")
            stage.add_argument(
                "--out", type=Path, metavar="FILE", help="where a sweep's page goes (default: its id.html)"
            )
    ensemble = add(
        "ensemble", verbs.ensemble, "write several models' directories as one, to teach and, of classifiers, to serve"
    )
    ensemble.add_argument("to", type=Path, metavar="FOLDER", help="Hugging Face directory that is made")
    ensemble.add_argument("member", type=Path, nargs="+", metavar="MEMBER",
                          help="Hugging Face directory of a model, or a package in its run's store")  # fmt: skip
    ensemble.add_argument("--combine", choices=("probabilities", "logits", "votes"), default="probabilities",
                          help="what of the members is averaged (default: probabilities)")  # fmt: skip
    ensemble.add_argument("--fit", type=Path, metavar="RECIPE",
                          help="weigh members by what helps on its validation rows (default: alike)")  # fmt: skip
    ensemble.add_argument("--set", action="append", default=[], metavar="a.b=c", help="set a field of that recipe")
    pick = add("pick", verbs.pick, "the best file that passed the gate within limits, and why not the others", "")
    _add_recipe(pick)
    for flag, unit, text in (
        ("--max-mb", "MB", "file size at most"),
        ("--max-p50-ms", "MS", "latency of half of the requests at most"),
        ("--max-p95-ms", "MS", "latency of 95 in 100 requests at most"),
        ("--max-resident-mb", "MB", "memory of the engine's process at most"),
        ("--min-quality", "Q", "accuracy at least (a share); bits per byte or root mean squared error at most"),
    ):
        pick.add_argument(flag, type=float, metavar=unit, help=text)


def _add_store_verbs(add: Add) -> None:
    board = add("dashboard", verbs.dashboard, "TensorBoard over the trials, and Ray's dashboard, until Ctrl-C")
    _add_recipe(board, nargs="?", help="recipe in YAML (default: everything in --store)")
    _add_store(board, "folder (default: store)")
    board.add_argument("--port", type=int, default=6006, metavar="N", help="of TensorBoard; 0 takes a free one")
    _add_store(add("ls", verbs.list_artifacts, "list the artifacts of a store, and what they take"))
    remove = add("rm", verbs.remove, "delete artifacts of a store from which nothing follows that stays")
    remove.add_argument("artifact", nargs="+", help="id as `ls` prints it, or a unique part of it")
    _add_store(remove)
    collect = add(
        "gc", verbs.collect_garbage, "list what no package, deployment or newest artifact needs, and delete it"
    )
    collect.add_argument("--yes", action="store_true", help="delete it; without, it is listed")
    for each in (remove, collect):
        each.add_argument(
            "--unlocked", action="store_true", help="nothing runs on this store, which has no lock: s3://"
        )
    _add_store(collect)
    export = add("export", verbs.export, "write a package as one file, to be handed on")
    export.add_argument("package", help="package directory or URI, or its id in --store")
    export.add_argument("file", type=Path, help="tar archive to write")
    _add_store(export)
    imported = add("import", verbs.import_package, "put a package that was exported into a store, verified")
    imported.add_argument("file", type=Path, help="archive of `overproof export`")
    _add_store(imported)
    show = add("show", verbs.show, "print what an artifact is, and its parents back to the shards")
    show.add_argument("artifact", help="id as `ls` prints it, RECIPE/STAGE, a unique part, or a directory")
    show.add_argument("--json", action="store_true", help="the record, for programs")
    _add_store(show)
    schema = add("schema", verbs.schema, "print the JSON schema of recipes")
    schema.add_argument("--text", action="store_true", help="one line for each field instead")


def _add_serving_verbs(add: Add) -> None:
    serve = add("serve", verbs.serve, "serve a package over HTTP until Ctrl-C", "serve")
    serve.add_argument("package", help="package directory, or its id in --store")
    deploy = add("deploy", verbs.deploy, "serve a package on a running cluster (RAY_ADDRESS), or try it there", "serve")
    deploy.add_argument("package", help="package directory or URI, or its id in --store")
    for each in (serve, deploy):
        _add_store(each)
        each.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field of serve")
    tried = deploy.add_mutually_exclusive_group()
    tried.add_argument("--canary", action="store_const", const="canary", dest="place", default="stable",
                       help="let it answer a share of the sessions")  # fmt: skip
    tried.add_argument("--shadow", action="store_const", const="shadow", dest="place",
                       help="let it read what comes in, and answer nobody")  # fmt: skip
    up = add("up", verbs.up, "start a Ray cluster on this machine, for `deploy` and the like; prints what to export")
    up.add_argument("--cpus", type=int, metavar="N", help="logical CPUs (default: the machine's, at least 4)")
    add("down", verbs.down, "end the cluster of `up`, and what runs on it; prints what to unset")
    promote = add("promote", verbs.promote, "let the version that is tried answer")
    roll_back = add("rollback", verbs.roll_back, "take back what is tried, or return to the version before")
    undeploy = add("undeploy", verbs.undeploy, "serve a model no longer")
    promote.add_argument("--yes", action="store_true", help="also where little is known of it")
    for each in (promote, roll_back, undeploy):
        each.add_argument("model", help="as `overproof deployments` names it")
    roll_back.add_argument("--reason", default="", help="why, for the record")
    history = add("deployments", verbs.deployments, "who serves what, and every change")
    history.add_argument("--file", help="read this file or URI instead of asking the running cluster")
    pair = add("signing-key", verbs.signing_key, "make a pair of keys: one signs packages, the other is for servers")
    pair.add_argument("file", type=Path, help="of the private key; the public one is FILE.pub")
    sign = add("sign", verbs.sign, "sign a package that was made without OVERPROOF_SIGNING_KEY")
    sign.add_argument("--key", required=True, metavar="FILE", help="private key of `overproof signing-key`")
    verify = add("verify", verbs.verify, "hold a package against its parts, keys and policies, as servers do")
    verify.add_argument("--keys", metavar="FILE", help="file or folder of public keys: one of them must have signed it")
    verify.add_argument(
        "--policy", action="append", default=[], metavar="SHA256", help="allow this policy (of several)"
    )
    for each in (sign, verify):
        each.add_argument("package", help="package directory or URI, or its id in --store")
        _add_store(each)
    keys = add("keys", verbs.keys, "make, list and revoke API keys of a file that servers read (OVERPROOF_KEYS)")
    keys.add_argument("what", choices=("add", "ls", "revoke"))
    keys.add_argument("name", nargs="?", help="whose key it is")
    keys.add_argument("--file", default="keys.json", help="file or URI (default: keys.json)")
    keys.add_argument("--requests-per-minute", type=int, metavar="N", help="most requests")
    keys.add_argument("--tokens-per-minute", type=int, metavar="N", help="most tokens of prompts and completions")
    keys.add_argument("--operator", action="store_true", help="may also read /metrics")


def _add_recipe(verb: argparse.ArgumentParser, help: str = "recipe in YAML", **options: Any) -> None:
    verb.add_argument("recipe", type=Path, help=help, **options)
    verb.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a recipe field")


def _add_store(verb: argparse.ArgumentParser, help: str = "folder or URI (default: store)") -> None:
    verb.add_argument("--store", default="store", help=help)


if __name__ == "__main__":
    sys.exit(main())
