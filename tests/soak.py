"""Hours of trouble: runs that are killed, interrupted and starved of disk end as undisturbed ones.

    python tests/soak.py --minutes 30

Round after round, a small bank is recycled twice with the same seed: once left alone, once stopped
at random moments and resumed until it ends. Every promised file must be the same to the byte. A
process is forked for each attempt, so that dozens a minute can be killed.
"""

import argparse
import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from test_recycler import INVERSION, META, assert_whole_files, listing, make, results

from fastrecycle import files

DONE, INTERRUPTED, NO_SPACE, REFUSED, BROKEN = 0, 10, 11, 12, 13
FAULTS = ("kill", "kill", "kill", "interrupt", "twice", "terminate", "full", "limit", "corrupt")
PATIENCE_S = 600


def settings(rng, length):
    """Sizes of one round, at random."""
    inversion = replace(
        INVERSION, iterations=rng.randint(20, 60) * length, group=rng.randint(1, 3),
        checkpoint_every=rng.randint(3, 15),
    )  # fmt: skip
    learn = rng.choice(["all", "first:2", "backbone"])
    meta = replace(
        META, steps=rng.randint(20, 60) * length, checkpoint_every=rng.randint(3, 15),
        validate_every=rng.randint(10, 20) * length, learn=learn,
        ema=0.0 if learn == "backbone" else rng.choice([0.0, 0.5]),
    )  # fmt: skip
    return {"inversion": inversion, "meta": meta, "seed": rng.randint(0, 10**6)}


def full_disk(after):
    """From the `after`-th file on the disk is full, at half of the file."""
    real, count = os.fsync, 0

    def fsync(fd):
        nonlocal count
        count += 1
        if count > after:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    files.os.fsync = fsync


def limit_files(size):
    """No file of this process may grow beyond these bytes, or infinity."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def attempt(out, chosen, log, prepare=None):
    """Fork a process that goes on with the run; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = BROKEN
    try:
        with log.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        if prepare is not None:
            prepare()
        make(**chosen).run(out)
        code = DONE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:
        limit_files(resource.RLIM_INFINITY)  # the log may be longer
        traceback.print_exc()
        code = NO_SPACE if error.errno in (errno.ENOSPC, errno.EFBIG) else BROKEN
    except ValueError as error:
        traceback.print_exc()
        code = REFUSED if "remove it to restart" in str(error) else BROKEN
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def ended(pid, within_s):
    """How a process ended: its code, minus a signal's number; None where it goes on."""
    end = time.monotonic() + within_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.001)


def last(pid):
    """The same, waited for; a process that hangs is an error."""
    code = ended(pid, PATIENCE_S)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise SystemExit(f"an attempt hung for {PATIENCE_S} s")
    return code


def corrupt(out, rng):
    """Change the newest checkpoint by a bit, or cut it short; the file, if there is one."""
    states = sorted(out.rglob("*.state.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    if not states:
        return None
    content = bytearray(states[-1].read_bytes())
    if rng.random() < 0.5:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)) :]
    states[-1].write_bytes(content)
    return states[-1]


def disturb(out, chosen, log, rng, whole_s):
    """One attempt under a random fault: (the fault, whether it met the run, how the run ended)."""
    fault = rng.choice(FAULTS)
    after_s = rng.uniform(0, 0.5 * whole_s)
    if fault == "corrupt":
        damaged = corrupt(out, rng)
        code = last(attempt(out, chosen, log)) if damaged else None
        if code == REFUSED:
            damaged.unlink()
        expected = {DONE, REFUSED}  # done: nothing was left for which it was needed
        return fault, code == REFUSED, code if damaged is None or code in expected else BROKEN
    prepare = None
    if fault == "full":
        prepare = partial(full_disk, rng.randint(0, 12))
    elif fault == "limit":  # a true short write, of checkpoints or of metrics
        prepare = partial(limit_files, rng.randint(100, 60_000))
    pid = attempt(out, chosen, log, prepare)
    if prepare is not None:
        code = last(pid)
        return fault, code == NO_SPACE, code if code in (DONE, NO_SPACE) else BROKEN
    code = ended(pid, after_s)
    if code is not None:
        return fault, False, code
    number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}.get(fault, signal.SIGINT)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        if fault == "twice":
            time.sleep(rng.uniform(0, 0.01))
            os.kill(pid, signal.SIGINT)
    code = last(pid)
    # before Python or the run takes the signal, it ends the process as the system has it
    good = {DONE, INTERRUPTED, -number}
    return fault, code != DONE, code if code in good else BROKEN


def one_round(folder, rng, length):
    """Both runs with one seed; counts of the faults that met the second."""
    chosen, log = settings(rng, length), folder / "log.txt"
    alone, troubled = folder / "alone", folder / "troubled"
    begin = time.monotonic()
    if (code := last(attempt(alone, chosen, log))) != DONE:
        raise SystemExit(f"the undisturbed run ended with {code}; see {log}")
    whole_s, met, attempts = time.monotonic() - begin, Counter(), 0
    while True:
        attempts += 1
        fault, struck, code = disturb(troubled, chosen, log, rng, whole_s)
        met[fault] += struck
        if code == BROKEN:
            raise SystemExit(f"an attempt under {fault} ended otherwise than promised; see {log}")
        if code == DONE:
            break
        if troubled.exists():
            assert_whole_files(troubled)
        if attempts > 500:
            raise SystemExit(f"no end after {attempts} attempts; see {folder}")
    for what, of in (("files", results), ("list of files", listing)):
        if of(troubled) != of(alone):
            raise SystemExit(f"the {what} of {troubled} differ from those of {alone}")
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of sizes and faults")
    parser.add_argument("--length", type=int, default=4, help="up to this many times 20-60 steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin, rounds, met = time.monotonic(), 0, Counter()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    while rounds == 0 or time.monotonic() - begin < 60 * arguments.minutes:
        rng = random.Random(f"{arguments.seed} {rounds}")
        inside = folder / f"round-{rounds}"
        inside.mkdir()
        met += one_round(inside, rng, rng.randint(1, arguments.length))
        shutil.rmtree(inside)  # kept where an error left the loop
        rounds += 1
        told = ", ".join(f"{count} {fault}" for fault, count in sorted(met.items()))
        print(
            f"{time.monotonic() - begin:6.0f} s  {rounds} rounds the same after {told}", flush=True
        )
    folder.rmdir()


if __name__ == "__main__":
    main()
