"""Report on the cache or shrink it: `python -m compress.cache report`, or `prune --max-gb 20`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from compress.cache.store import list_entries, lock_if_unused, prune_cache


def main(words: list[str] | None = None, program: str = "python -m compress.cache") -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(program, description="Report on the cache of finished stages, or shrink it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{report,prune}")
    for name, purpose in (
        ("report", "list the entries and their sizes"),
        ("prune", "remove the least recently used entries"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose[:1].upper() + purpose[1:] + ".")
        command.add_argument("--dir", type=Path, default=Path("multirun/.cache"), help="default: %(default)s")
        if name == "prune":
            size = command.add_mutually_exclusive_group(required=True)
            size.add_argument("--max-gb", type=float, metavar="GB", help="remove entries until so much is left")
            size.add_argument("--all", action="store_const", const=0.0, dest="max_gb", help="remove all entries")
            stopped = "remove the checkpoints of stopped trainings too, which then start from the beginning"
            command.add_argument("--stopped", action="store_true", help=stopped)
    arguments = parser.parse_args(words)
    if not arguments.dir.is_dir():
        parser.error(f"--dir is {arguments.dir}, which is not a folder; expected a cache. Set --dir=multirun/.cache.")
    if arguments.command == "prune":
        removed = prune_cache(arguments.dir, arguments.max_gb, arguments.stopped)
        print(f"removed {len(removed)} entries, {sum(entry.size_bytes for entry in removed) / 1e9:.3f} GB")
        kept = [] if arguments.stopped else [entry for entry in list_entries(arguments.dir) if entry.is_stopped]
        if kept:
            size_gb = sum(entry.size_bytes for entry in kept) / 1e9
            print(f"kept {len(kept)} stopped trainings, {size_gb:.3f} GB; --stopped removes them too")
    entries = list_entries(arguments.dir)
    for entry in entries if arguments.command == "report" else ():
        with lock_if_unused(entry.path) as free:
            state = "" if free else "  in use"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.size_bytes / 1e9:9.3f} GB  {used}  {entry.path.parent.name:8}  {entry.name}{state}")
    print(f"{sum(entry.size_bytes for entry in entries) / 1e9:9.3f} GB in {len(entries)} entries of {arguments.dir}")


if __name__ == "__main__":
    main()
