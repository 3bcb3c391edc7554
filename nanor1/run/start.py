"""How a run starts: from the command line, or from the run that it resumes; and its folder."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from nanor1.run.checkpoint import checkpoint_folders, digest, latest_checkpoint, step_of
from nanor1.run.config import from_json, load_arguments, option_name, parse_args, refuse_idle, to_json, validated
from nanor1.run.log import Columns, RunLog, default_run_folder, write_json

C = TypeVar("C")


def read_command_line(
    Config: type[C], complete: Callable[[C, frozenset[str]], C], description: str
) -> tuple[C, Path | None]:
    """The configuration, and with --resume the checkpoint to go on from. Flags beat the resumed run's own arguments.

    `complete(config, given)` adds to a new run's what follows from the flags given, as the settings of a miniature.
    """
    config, given = parse_args(Config, description=description)
    config, checkpoint = resumed(config, given) if config.resume else (validated(complete(config, given)), None)
    refuse_idle(config, given)
    return config, checkpoint


def resumed(config: C, given: Iterable[str]) -> tuple[C, Path | None]:
    """The configuration and the newest whole checkpoint of the run in `config.resume`; flags beat its arguments.

    `given` are the names of the fields that the command line set. No checkpoint: the run ended before its first one,
    and begins again. ValueError where there is no run, or all its checkpoints are damaged.
    """
    if "preset" in given:
        raise ValueError("--preset is for a new run; with --resume give the single flags")
    folder, values = Path(config.resume), to_json(config)
    stored = load_arguments(folder / "config.json")
    for name in {"model", "out", "from_scratch"} & {*given}:
        if values[name] != stored.get(name) and (name, values[name]) != ("out", config.resume):
            raise ValueError(
                f"{option_name(name)} has no effect with --resume, which goes on from the run's newest checkpoint in "
                "its own folder; leave it out, or begin a new run"
            )
    stored |= {name: values[name] for name in given}
    config = from_json(type(config), stored, f"{folder}/config.json")
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None and checkpoint_folders(folder / "checkpoints"):
        raise ValueError(f"{folder} has no whole checkpoint to resume from; start a new run")
    if is_counted_in_steps(config):
        end_if_finished(config, checkpoint, config.steps, print)
    return config, checkpoint


def is_counted_in_steps(config) -> bool:
    """Whether --steps says how long the run is, and not the epochs of data that is yet to be read."""
    return bool(config.steps) or not hasattr(config, "epochs")


def end_if_finished(config, checkpoint: Path | None, n_steps: int, say: Callable[[str], None]) -> None:
    """End the program where the resumed run has made its steps and written what it came to."""
    summary = Path(config.resume or "") / "summary.json"
    if checkpoint is None or step_of(checkpoint) < n_steps or not summary.exists():
        return
    if json.loads(summary.read_text(encoding="utf-8"))["steps"] == step_of(checkpoint):
        more = f"more than --steps {n_steps}" if is_counted_in_steps(config) else "more --epochs or --steps"
        done = f"{config.resume} is finished, {step_of(checkpoint)} steps: see summary.json there"
        say(f"{done}; to train on, give {more}")
        raise SystemExit(0)


def open_log(config, checkpoint: Path | None, name: str, columns: Columns, files: Sequence[str | None] = ()) -> RunLog:
    """The run's log: of the resumed run cut back to its checkpoint, or of a new one in `config.out` or runs/NAME-TIME.

    `files` are those that the run reads its data from. Their digests are kept in config.json; ValueError where one is
    not what it was, unless --allow-changed-data, which keeps the new ones.
    """
    digests = {path: digest(Path(path))["sha256"] for path in files if path and Path(path).is_file()}
    if not config.resume:
        return RunLog.create(config.out or default_run_folder(name), to_json(config), columns, digests)
    made_of = json.loads((Path(config.resume) / "config.json").read_text(encoding="utf-8"))
    changes = changed_data(made_of.get("data_sha256"), digests)
    if changes and not config.allow_changed_data:
        raise ValueError(
            f"{'; '.join(changes)} since {config.resume} began: begin a new run from its checkpoint with --model, or "
            "go on with --allow-changed-data"
        )
    log = RunLog.open(config.resume, step_of(checkpoint) if checkpoint else None, columns)
    for change in changes:
        log.say(f"warning: {change} since the run began")
    if changes:
        write_json(log.folder / "config.json", made_of | {"data_sha256": digests})
    return log


def changed_data(before: dict[str, str] | None, now: dict[str, str]) -> list[str]:
    """How the digests of data files differ, in words; of a run that kept none nothing is said.

    A file of another name that holds what one held before was moved, and has not changed.
    """
    if before is None:
        return []
    kept, held = {*before.values()}, {*now.values()}
    changes = [f"{path} has changed" for path in now if now[path] != before.get(path, now[path])]
    changes += [f"{path} was added" for path in now if path not in before and now[path] not in kept]
    gone = [path for path in before if path not in now and before[path] not in held]
    return changes + [f"{path} is gone, or no longer given," for path in gone]
