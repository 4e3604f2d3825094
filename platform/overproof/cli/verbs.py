"""What each verb runs. Its module is imported here, so that help and errors do not wait for torch and Ray."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from overproof import console
from overproof.config import load_recipe, schema_docs
from overproof.errors import InputError

if TYPE_CHECKING:
    from overproof.cli.recipe_arguments import RecipeArguments
    from overproof.shrink.choice import Asked


def shrink(options: argparse.Namespace) -> int:
    from overproof.cli import shrink

    return shrink.shrink(_asked(options), options.out)


def init(options: argparse.Namespace) -> int:
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
        flags=ColumnFlags(options.label, options.text, options.image, tuple(options.pattern), options.image_size),
        overrides=tuple(options.set),
    )


def demo(options: argparse.Namespace) -> int:
    from overproof.cli import serve
    from overproof.serve.environment import hidden_api_key

    with hidden_api_key():
        recipe = load_recipe(options.recipe, tuple(options.set))
        return serve.demo(recipe, _recipe_arguments(options), keep=options.keep)


def _recipe_arguments(options: argparse.Namespace) -> RecipeArguments:
    from overproof.cli.recipe_arguments import RecipeArguments

    return RecipeArguments(options.recipe, tuple(options.set))


def run_stages(options: argparse.Namespace) -> int:
    from overproof.cli import artifacts

    recipe = load_recipe(options.recipe, tuple(options.set))
    done = artifacts.run_to_summary(recipe, _recipe_arguments(options), options.until)
    if "package" in done:
        artifacts.print_package(recipe.store, done["package"])
    if "speculate" in done:
        console.out.print(f"with its teacher, as the draft  {done['speculate'].uri}")
    return 0


def ensemble(options: argparse.Namespace) -> int:
    from overproof.cli import ensemble

    if options.fit is None and options.set:
        raise InputError(f"--set {options.set[0]}: changes a recipe, and there is none; expected --fit RECIPE")
    recipe = None if options.fit is None else load_recipe(options.fit, tuple(options.set))
    return ensemble.ensemble(options.to, options.member, options.combine, recipe)


def compress(options: argparse.Namespace) -> int:
    from overproof.cli import artifacts

    recipe = load_recipe(options.recipe, tuple(options.set))
    artifacts.compress_to_table(recipe, _recipe_arguments(options))
    return 0


def report(options: argparse.Namespace) -> int:
    if options.recipe.is_file() or options.recipe.suffix in (".yaml", ".yml"):
        return run_stages(options)
    from overproof.cli import artifacts

    return artifacts.sweep_page(options.store, str(options.recipe), options.out)


def plan(options: argparse.Namespace) -> int:
    from overproof.cli import plan

    given = plan.PlanOptions(options.cluster, options.tokens_per_s, options.rows_per_s)
    return plan.plan(load_recipe(options.recipe, tuple(options.set)), given)


def prove(options: argparse.Namespace) -> int:
    from overproof.cli import prove

    recipe = load_recipe(options.recipe, tuple(options.set))
    if options.what == "resume":
        return prove.prove_resume(recipe, options.kills, options.seed)
    return prove.prove_elastic(recipe, options.seed)


def pick(options: argparse.Namespace) -> int:
    from overproof.cli import select

    budget = select.Budget(
        options.max_mb, options.max_p50_ms, options.max_p95_ms, options.max_resident_mb, options.min_quality
    )
    recipe = load_recipe(options.recipe, tuple(options.set))
    return select.select(recipe, _recipe_arguments(options), budget)


def dashboard(options: argparse.Namespace) -> int:
    from overproof.cli import dashboard

    if options.recipe is None:
        return dashboard.dashboard(options.store, None, options.port)
    recipe = load_recipe(options.recipe, tuple(options.set))
    return dashboard.dashboard(recipe.store, recipe.name, options.port)


def list_artifacts(options: argparse.Namespace) -> int:
    from overproof.cli import store

    return store.list_artifacts(options.store)


def remove(options: argparse.Namespace) -> int:
    from overproof.cli import store

    return store.remove(options.store, options.artifact, options.unlocked)


def collect_garbage(options: argparse.Namespace) -> int:
    from overproof.cli import store

    return store.collect_garbage(options.store, options.yes, options.unlocked)


def export(options: argparse.Namespace) -> int:
    from overproof.cli import store

    return store.export(options.package, options.store, options.file)


def import_package(options: argparse.Namespace) -> int:
    from overproof.cli import store

    return store.import_package(options.file, options.store)


def show(options: argparse.Namespace) -> int:
    from overproof.cli import artifacts

    return artifacts.show_artifact(options.store, options.artifact, options.json)


def schema(options: argparse.Namespace) -> int:
    print(schema_docs.describe_fields() + "\n" if options.text else schema_docs.json_schema(), end="")
    return 0


def serve(options: argparse.Namespace) -> int:
    from overproof.cli import serve
    from overproof.serve.environment import hidden_api_key

    with hidden_api_key():
        return serve.serve_until_stopped(options.package, options.store, tuple(options.set))


def up(options: argparse.Namespace) -> int:
    from overproof.cli import local_cluster

    return local_cluster.up(options.cpus)


def down(_: argparse.Namespace) -> int:
    from overproof.cli import local_cluster

    return local_cluster.down()


def deploy(options: argparse.Namespace) -> int:
    from overproof.cli import deploy
    from overproof.serve.environment import hidden_api_key

    with hidden_api_key():
        return deploy.deploy(options.package, options.store, options.set, options.place)


def promote(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.promote(options.model, options.yes)


def roll_back(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.roll_back(options.model, options.reason)


def undeploy(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.undeploy(options.model)


def deployments(options: argparse.Namespace) -> int:
    from overproof.cli import deploy

    return deploy.print_deployments(options.file)


def signing_key(options: argparse.Namespace) -> int:
    from overproof.cli import sign

    return sign.make_signing_key(options.file)


def sign(options: argparse.Namespace) -> int:
    from overproof.cli import sign

    return sign.sign(options.package, options.store, options.key)


def verify(options: argparse.Namespace) -> int:
    from overproof.cli import sign

    return sign.verify(options.package, options.store, options.keys, options.policy)


def keys(options: argparse.Namespace) -> int:
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
        listed = api_keys.read_keys(options.file).keys
        if not listed:
            raise InputError(
                f"--file {options.file}: is not there, or holds no key; make one: `overproof keys add NAME`"
            )
        for key in listed:
            rights = [f"{most:,} {what} a minute" for most, what in key.limits] + ["operator"] * key.operator
            console.out.print("  ".join([key.name, key.created, *rights]), markup=False)
    return 0
