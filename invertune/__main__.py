"""The command line: ``python -m invertune COMMAND``. User errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from invertune import plan
from invertune.arguments import add_options, add_run_options, mapping_of, overrides_of
from invertune.sections import OWN_IMAGES
from invertune.settings import SettingsError, load_settings
from invertune.terminal import printable, quiet_in_a_log

# Modules that import torch are imported late: a wrong argument should not wait seconds for it.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 (a check failed) or 2 (a wrong argument, a full disk)."""
    options = _parser().parse_args(arguments)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ and options.run is not _fill:
            raise SettingsError("torchrun is for the command fill only; run this one without it")
        quiet_in_a_log()
        return options.run(options)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        rank = os.environ.get("RANK")  # of torchrun's processes each tells its own
        where = "" if rank is None else f" in process {rank}"
        print(f"error{where}: {explain(error)}", file=sys.stderr)
        return 2


def explain(error: Exception) -> str:
    """One line for an error that a user can mend (the package's own, or the system's).

    Raises every other error again: it is a bug, and its traceback is wanted.
    """
    if type(error).__module__.startswith("invertune."):
        return printable(" ".join(str(error).split()))
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return printable(f"{error.strerror or error}{place}")
    raise error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m invertune", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("check", _check, "versions, device, memory, disk, data, models, and the next command")
    add_options(add("data", _data, "describes the data of a profile"))
    pretrain = add("pretrain", _pretrain, "pretrains a shipped model and replaces it; resumable")
    pretrain.add_argument("backbone")
    pretrain.add_argument("profile", nargs="?", default="mini")
    pretrain.add_argument("--overrides", metavar="YAML", help="nested settings as YAML")
    fill = add("fill", _fill, "makes what notebooks need trained or inverted; also under torchrun")
    add_options(fill)
    add_run_options(fill)
    purified = add("purify", _purify, "InverTune on a model of your own: report, purified weights")
    purified.add_argument("weights", help="local-dir:FOLDER, file:CHECKPOINT, or an open_clip tag")
    add_options(purified)
    purified.add_argument("--out", metavar="FOLDER", required=True, help="new: gets the results")
    purified.add_argument("--images", metavar="FOLDER", help="your own, in a folder for each class")
    purified.add_argument("--rounds", type=int, choices=(1, 2), default=1, help="of steps 2 and 3")
    add_options(add("page", _page, "writes figures/PROFILE/README.md: claims, figures, tables"))
    compare = add("compare", _compare, "a run beside the published results of the same seeds")
    compare.add_argument("profile", nargs="?", default="mini")
    add("publish", _publish, "makes a profile's results the expected ones").add_argument("profile")
    planned = add("plan", show_plan, "steps, exposures, minutes and memory of a run")
    add_options(planned)
    add_run_options(planned)
    store = add("store", _store, "lists, shows or verifies stored artifacts")
    store.add_argument("action", choices=("list", "show", "verify"))
    store.add_argument("key", nargs="?", help="the first digits of a key, for show")
    return parser


def _check(_: argparse.Namespace) -> int:
    from invertune import check

    lines, ready = check.report()
    print("\n".join(lines))
    return 0 if ready else 1


def _data(options: argparse.Namespace) -> int:
    settings = load_settings(options.profile, overrides_of(options))
    from invertune import data

    print(data.describe(settings))
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    overrides = mapping_of(options.overrides)
    from invertune import embedded

    embedded.pretrain_embedded(options.backbone, options.profile, overrides)
    return 0


def _fill(options: argparse.Namespace) -> int:
    overrides, together = overrides_of(options), "TORCHELASTIC_RUN_ID" in os.environ
    settings = load_settings(options.profile, overrides)
    if together and options.jobs:
        raise SettingsError("torchrun's processes share every training: leave --jobs out")
    from invertune import data, distributed, jobs

    data.check(settings, (settings.target, *settings.generalization.targets))
    chosen = jobs.chosen(settings, options.only)
    distributed.start()
    count = 1 if together else options.jobs or jobs.default_count(settings)
    for name in chosen:
        jobs.fill(settings, name, count)
    distributed.stop()
    return 0


def show_plan(options: argparse.Namespace) -> int:
    """Prints the plan for parsed options; computes and downloads nothing."""
    settings = load_settings(options.profile, overrides_of(options))
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    from invertune import jobs

    jobs.chosen(settings, options.only)
    count = options.jobs or jobs.default_count(settings)
    try:
        held = jobs.held(settings, options.only or "")
    except Exception as error:  # no data, no weights: the plan is wanted all the same
        held = [f"not known: {explain(error)}"]
    print(plan.report(settings, held, count, options.only))
    return 0


def _purify(options: argparse.Namespace) -> int:
    overrides = {**overrides_of(options), "weights": options.weights}
    data = overrides.get("data", {})
    if options.images is not None and isinstance(data, dict):  # else load_settings refuses it
        overrides["data"] = {**data, "source": OWN_IMAGES + options.images}
    settings = load_settings(options.profile, overrides)
    from invertune import purify, weights

    if "backbone" not in overrides and (named := weights.shipped_as(options.weights)):
        settings = settings.model_copy(update={"backbone": named})
    print(purify.purify(settings, Path(options.out), options.rounds))
    return 0


def _page(options: argparse.Namespace) -> int:
    settings = load_settings(options.profile, overrides_of(options))
    from invertune import gallery

    print(gallery.write(settings))
    return 0


def _compare(options: argparse.Namespace) -> int:
    load_settings(options.profile)
    from invertune import reproduction

    text, same = reproduction.compare(options.profile)
    print(text)
    return 0 if same else 1


def _publish(options: argparse.Namespace) -> int:
    load_settings(options.profile)
    from invertune import results

    results.publish(options.profile)
    return 0


def _store(options: argparse.Namespace) -> int:
    from invertune import store

    root = store.default_root()
    entries, prefix = store.entries(root), options.key or ""
    if options.action == "show":
        matching = [a for a in entries if a.key.startswith(prefix)]
        if len(matching) != 1 or not prefix:
            raise store.StoreError(
                f"{len(matching)} artifacts have a key that starts with {prefix!r} "
                "in the store; name one, see: store list"
            )
        print(json.dumps({"folder": str(matching[0].folder), **matching[0].meta}, indent=1))
        return 0
    broken = store.verify(root)
    for artifact in entries:
        name = artifact.key[:8]
        if artifact.key in broken:
            print(f"{name} is damaged: {printable(broken[artifact.key])}")
        elif options.action == "list":
            print(f"{name}  {printable(store.SUMMARY.format_map(artifact.meta))}")
    if options.action == "list":
        return 0
    print(f"{len(entries)} artifacts in {root}, {len(broken)} damaged")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
