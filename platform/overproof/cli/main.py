"""The command line. Exit codes: 0 done, 1 the gate refused or nothing fits, 2 bad input, 130 stopped with Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overproof import console
from overproof.config import load_recipe, schema_docs
from overproof.errors import GateRefused, InputError, suggest_name

if TYPE_CHECKING:
    from overproof.cli.recipe_arguments import RecipeArguments
    from overproof.shrink.choice import Asked

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
    "compress": ("compress", "export and quantise the students that are kept"),
    "evaluate": ("evaluate", "measure every exported file"),
    "gate": ("gate", "judge the measurements by the recipe's policy"),
    "report": ("name", "draw the picture and the HTML report"),
    "package": ("name", "pack the file that passed, with its proof"),
    "speculate": ("speculate", "pack the teacher with that file as its draft, if its text then comes sooner"),
}


class _WarningLines(logging.Handler):
    """Warnings of the package, each on a line of standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"overproof: warning: {record.getMessage()}", file=sys.stderr)


WARNINGS = _WarningLines(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    logging.getLogger("overproof").addHandler(WARNINGS)
    try:
        options = parse_arguments(sys.argv[1:] if argv is None else argv)
        return int(options.run(options))
    except InputError as error:
        print(f"overproof: {error}", file=sys.stderr)
        return 2
    except GateRefused as refused:
        print(f"overproof: {refused}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("overproof: stopped; finished stages stay, run the same command to go on", file=sys.stderr)
        return 130


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's options, and in ``run`` the function that takes them.

    Raises:
        InputError: there is no such verb.
        SystemExit: help was asked for, or an option is unknown or malformed.
    """
    parser = argparse.ArgumentParser(prog="overproof", description="From sharded data to a small model you can trust.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Run, text: str, section: str | None = None) -> argparse.ArgumentParser:
        fields = None if section is None else f"recipe fields (--set a.b=c):\n{schema_docs.describe_fields(section)}"
        added = verbs.add_parser(name, help=text, description=text, epilog=fields,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        added.set_defaults(run=run)
        return added

    _add_shrink_verbs(add)
    _add_recipe_verbs(add)
    _add_store_verbs(add)
    _add_serving_verbs(add)
    if argv and not argv[0].startswith("-") and argv[0] not in verbs.choices:
        near = suggest_name(argv[0], verbs.choices)
        raise InputError(f"{argv[0]}: no such verb{near}; expected one that `overproof --help` lists")
    return parser.parse_args(argv)


def _add_shrink_verbs(add: Add) -> None:
    for name, run, text in (
        ("shrink", _shrink, "from your data, and your model where you have one, to a smaller one that is proven"),
        ("init", _init, "write the recipe that `shrink` would run, and stop"),
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
        verb.add_argument("--pattern", metavar="GLOB", help="which files are documents, such as '*.md'")
        verb.add_argument("--image-size", type=int, metavar="PIXELS", help="edges that images are scaled to")
        verb.add_argument("--name", help="of the run and its recipe (default: after the model or the data)")
        verb.add_argument("--out", type=Path, metavar="FILE", help="where the recipe goes (default: NAME.yaml)")
        verb.add_argument("--set", action="append", default=[], metavar="a.b=c", help="write a recipe field otherwise")


def _add_recipe_verbs(add: Add) -> None:
    demo = add("demo", _demo, "run the whole loop on one machine and ask the served model", "")
    _add_recipe(demo, nargs="?", default=DEMO_RECIPE, help="recipe (default: stdlib-lm)")
    demo.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    run = add("run", _run_stages, "run every stage that is not done yet", "")
    _add_recipe(run)
    run.add_argument("--until", metavar="STAGE", help=f"last stage to run (default: all): {', '.join(STAGE_VERBS)}")
    plan = add("plan", _plan, "say what would run, what it holds and asks for, and whether it can ever start", "")
    _add_recipe(plan)
    plan.add_argument("--cluster", type=Path, metavar="FILE", help="plan for what this `ray up` file may grow to")
    plan.add_argument("--tokens-per-s", type=float, metavar="N", help="throughput, for the hours of a language model")
    plan.add_argument(
        "--rows-per-s", type=float, metavar="N", help="throughput in rows (images, rows of a table) instead"
    )
    prove = add("prove", _prove, "train twice, once with workers killed or moved, and compare", "")
    prove.add_argument("what", choices=("resume", "elastic"), help="workers killed; or nodes that die and join")
    _add_recipe(prove)
    prove.add_argument("--kills", type=int, default=3, metavar="N", help="workers killed by `resume` (default: 3)")
    prove.add_argument("--seed", type=int, default=0, metavar="N", help="of the steps at which it happens")
    for name, (section, text) in STAGE_VERBS.items():
        function = _report if name == "report" else _run_stages
        stage = add(name, function, f"{text} (and the stages it needs, where they are not done)", section)
        _add_recipe(stage, help="recipe in YAML, or a sweep's id" if name == "report" else "recipe in YAML")
        stage.set_defaults(until=name)
        if name == "report":
            _add_store(stage, "where the sweep lies: folder or URI (default: store)")
            stage.add_argument(
                "--out", type=Path, metavar="FILE", help="where a sweep's page goes (default: its id.html)"
            )
    pick = add("pick", _pick, "the best file that passed the gate within limits, and why the others were left out", "")
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
    board = add("dashboard", _dashboard, "TensorBoard over the trials, and Ray's dashboard, until Ctrl-C")
    _add_recipe(board, nargs="?", help="recipe in YAML (default: everything in --store)")
    _add_store(board, "folder (default: store)")
    board.add_argument("--port", type=int, default=6006, metavar="N", help="of TensorBoard; 0 takes a free one")
    _add_store(add("ls", _list, "list the artifacts of a store"))
    show = add("show", _show, "print an artifact's record, and its parents back to the shards")
    show.add_argument("artifact", help="id as `ls` prints it, a unique part of it, or a directory")
    _add_store(show)
    schema = add("schema", _schema, "print the JSON schema of recipes")
    schema.add_argument("--text", action="store_true", help="one line for each field instead")


def _add_serving_verbs(add: Add) -> None:
    serve = add("serve", _serve, "serve a package over HTTP until Ctrl-C", "serve")
    serve.add_argument("package", help="package directory, or its id in --store")
    deploy = add("deploy", _deploy, "serve a package on the running cluster (RAY_ADDRESS), or try it there", "serve")
    deploy.add_argument("package", help="package directory or URI, or its id in --store")
    for each in (serve, deploy):
        _add_store(each)
        each.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field of serve")
    tried = deploy.add_mutually_exclusive_group()
    tried.add_argument("--canary", action="store_const", const="canary", dest="place", default="stable",
                       help="let it answer a share of the sessions")  # fmt: skip
    tried.add_argument("--shadow", action="store_const", const="shadow", dest="place",
                       help="let it read what comes in, and answer nobody")  # fmt: skip
    promote = add("promote", _promote, "let the version that is tried answer")
    roll_back = add("rollback", _roll_back, "take back what is tried, or return to the version before")
    undeploy = add("undeploy", _undeploy, "serve a model no longer")
    for each in (promote, roll_back, undeploy):
        each.add_argument("model", help="as `overproof deployments` names it")
    roll_back.add_argument("--reason", default="", help="why, for the record")
    history = add("deployments", _deployments, "who serves what, and every change")
    history.add_argument("--file", help="read this file or URI instead of asking the running cluster")
    pair = add("signing-key", _signing_key, "make a pair of keys: one signs packages, the other is for servers")
    pair.add_argument("file", type=Path, help="of the private key; the public one is FILE.pub")
    sign = add("sign", _sign, "sign a package that was made without OVERPROOF_SIGNING_KEY")
    sign.add_argument("--key", required=True, metavar="FILE", help="private key of `overproof signing-key`")
    verify = add("verify", _verify, "hold a package against its parts, keys and policies, as servers do")
    verify.add_argument("--keys", metavar="FILE", help="file or folder of public keys: one of them must have signed it")
    verify.add_argument(
        "--policy", action="append", default=[], metavar="SHA256", help="allow this policy (of several)"
    )
    for each in (sign, verify):
        each.add_argument("package", help="package directory or URI, or its id in --store")
        _add_store(each)
    keys = add("keys", _keys, "make, list and revoke API keys of a file that servers read (OVERPROOF_KEYS)")
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


# What each verb runs. Its module is imported here, so that help and errors do not wait for torch and Ray.


def _shrink(options: argparse.Namespace) -> int:
    from overproof.cli import shrink

    return shrink.shrink(_asked(options), options.out)


def _init(options: argparse.Namespace) -> int:
    from overproof.cli import shrink

    return shrink.init(_asked(options), options.out)


def _asked(options: argparse.Namespace) -> Asked:
    from overproof.shrink.choice import Asked
    from overproof.tasks.recognition import ColumnFlags

    return Asked(
        data=options.data,
        model=None if options.model == "-" else options.model,
        task=options.task,
        max_mb=options.max_mb,
        max_p95_ms=options.max_p95_ms,
        keep=options.keep,
        finetune=options.finetune,
        max_minutes=options.max_minutes,
        name=options.name,
        flags=ColumnFlags(options.label, options.text, options.image, options.pattern, options.image_size),
        overrides=tuple(options.set),
    )


def _demo(options: argparse.Namespace) -> int:
    from overproof.cli import serve
    from overproof.serve.environment import hidden_api_key

    with hidden_api_key():
        recipe = load_recipe(options.recipe, tuple(options.set))
        return serve.demo(recipe, _recipe_arguments(options), keep=options.keep)


def _recipe_arguments(options: argparse.Namespace) -> RecipeArguments:
    from overproof.cli.recipe_arguments import RecipeArguments

    return RecipeArguments(options.recipe, tuple(options.set))


def _run_stages(options: argparse.Namespace) -> int:
    from overproof import pipeline
    from overproof.cli import artifacts

    recipe = load_recipe(options.recipe, tuple(options.set))
    arguments = _recipe_arguments(options)
    try:
        done = pipeline.run(recipe, options.until)
    except GateRefused:
        artifacts.print_summary(recipe, arguments)
        raise
    if "gate" in done:
        artifacts.print_summary(recipe, arguments)
    if "package" in done:
        artifacts.print_package(recipe, done["package"])
    if "speculate" in done:
        console.out.print(f"with its teacher, as the draft  {done['speculate'].uri}")
    return 0


def _report(options: argparse.Namespace) -> int:
    if options.recipe.is_file() or options.recipe.suffix in (".yaml", ".yml"):
        return _run_stages(options)
    from overproof.cli import artifacts

    return artifacts.sweep_page(options.store, str(options.recipe), options.out)


def _plan(options: argparse.Namespace) -> int:
    from overproof.cli import plan

    given = plan.PlanOptions(options.cluster, options.tokens_per_s, options.rows_per_s)
    return plan.plan(load_recipe(options.recipe, tuple(options.set)), given)


def _prove(options: argparse.Namespace) -> int:
    from overproof.cli import prove

    recipe = load_recipe(options.recipe, tuple(options.set))
    if options.what == "resume":
        return prove.prove_resume(recipe, options.kills, options.seed)
    return prove.prove_elastic(recipe, options.seed)


def _pick(options: argparse.Namespace) -> int:
    from overproof.cli import select

    budget = select.Budget(
        options.max_mb, options.max_p50_ms, options.max_p95_ms, options.max_resident_mb, options.min_quality
    )
    recipe = load_recipe(options.recipe, tuple(options.set))
    return select.select(recipe, _recipe_arguments(options), budget)


def _dashboard(options: argparse.Namespace) -> int:
    from overproof.cli import dashboard
    from overproof.files import join_uri

    recipe = load_recipe(options.recipe, tuple(options.set)) if options.recipe else None
    return dashboard.dashboard(join_uri(recipe.store, recipe.name) if recipe else options.store, options.port)


def _list(options: argparse.Namespace) -> int:
    from overproof.cli import artifacts

    return artifacts.list_artifacts(options.store)


def _show(options: argparse.Namespace) -> int:
    from overproof.cli import artifacts

    return artifacts.show_artifact(options.store, options.artifact)


def _schema(options: argparse.Namespace) -> int:
    print(schema_docs.describe_fields() + "\n" if options.text else schema_docs.json_schema(), end="")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from overproof.cli import serve
    from overproof.serve.environment import hidden_api_key

    with hidden_api_key():
        return serve.serve_until_stopped(options.package, options.store, tuple(options.set))


def _deploy(options: argparse.Namespace) -> int:
    from overproof.cli import deploy
    from overproof.serve.environment import hidden_api_key

    with hidden_api_key():
        return deploy.deploy(options.package, options.store, options.set, options.place)


def _promote(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.promote(options.model)


def _roll_back(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.roll_back(options.model, options.reason)


def _undeploy(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.undeploy(options.model)


def _deployments(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.print_deployments(options.file)


def _signing_key(options: argparse.Namespace) -> int:
    from overproof.cli import sign

    return sign.make_signing_key(options.file)


def _sign(options: argparse.Namespace) -> int:
    from overproof.cli import sign

    return sign.sign(options.package, options.store, options.key)


def _verify(options: argparse.Namespace) -> int:
    from overproof.cli import sign

    return sign.verify(options.package, options.store, options.keys, options.policy)


def _keys(options: argparse.Namespace) -> int:
    from overproof.serve import api_keys

    if (options.name is None) != (options.what == "ls"):
        raise InputError(f"keys {options.what}: found name {options.name!r}; expected one to add or revoke, else none")
    if options.what == "add":
        limits = options.requests_per_minute, options.tokens_per_minute
        print(api_keys.add_key(options.file, options.name, *limits, options.operator))
        print(f"overproof: shown this once, {options.file} holds its hash alone", file=sys.stderr)
    elif options.what == "revoke":
        api_keys.revoke_key(options.file, options.name)
    else:
        for key in api_keys.read_keys(options.file).keys:
            rights = [f"{most:,} {what} a minute" for most, what in key.limits] + ["operator"] * key.operator
            console.out.print("  ".join([key.name, key.created, *rights]), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
