"""Report on the cache or shrink it: `python -m compress.cache report`, or `prune --max-gb 20`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from compress.cache.store import list_entries, lock_if_unused, prune_cache


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compress.cache", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("report", "prune"))
    parser.add_argument("--dir", type=Path, default=Path("multirun/.cache"), help="default: %(default)s")
    parser.add_argument("--max-gb", type=float, default=0.0, help="what prune leaves, default: nothing")
    given = parser.parse_args(words)
    if not given.dir.is_dir():
        parser.error(f"there is no folder {given.dir}: name that of a cache (--dir).")
    if given.command == "prune":
        removed = prune_cache(given.dir, given.max_gb)
        print(f"removed {len(removed)} entries, {sum(entry.size_bytes for entry in removed) / 1e9:.3f} GB")
    every = list_entries(given.dir)
    for entry in every if given.command == "report" else ():
        with lock_if_unused(entry.path) as free:
            state = "" if free else "  in use"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.size_bytes / 1e9:9.3f} GB  {used}  {entry.path.parent.name:8}  {entry.name}{state}")
    print(f"{sum(entry.size_bytes for entry in every) / 1e9:9.3f} GB in {len(every)} entries of {given.dir}")


if __name__ == "__main__":
    main()
