"""Bugs of what stands between the input of somebody else and the rest: bounds, filters, counts."""

from __future__ import annotations

from bugs.bug import Bug

_READING = "test_reading.py"

BUGS = [
    Bug(
        "reading.py",
        "    if not stat.S_ISREG(found.st_mode):\n",
        "    if stat.S_ISFIFO(found.st_mode):\n",
        _READING,
    ),
    Bug(
        "reading.py", "    if found.st_size > most:\n", "    if found.st_size >= most:\n", _READING
    ),
    Bug(
        "reading.py",
        "    for _ in range(deepest):\n",
        "    for _ in range(deepest + 1):\n",
        _READING,
    ),
    Bug("terminal.py", "\\u2066-\\u2069", "", _READING),
    Bug("terminal.py", "m[0] if m[0] in keep else", "m[0] if keep else", _READING),
    Bug(
        "errors.py", "    except (AltpropError, OSError):\n", "    except AltpropError:\n", _READING
    ),
    Bug(
        "lab/config.py",
        "            if len(node.value) > LONGEST:\n",
        "            if False:\n",
        _READING,
    ),
    Bug("lab/config.py", "1 + sum(n for n, _ in sizes)", "1 + len(sizes)", _READING),
    Bug("lab/config.py", "self._depth + depth)", "self._depth)", _READING),
    Bug(
        "lab/config.py",
        "refuse(name for name in unsaid if name in hints and",
        "refuse(name for name in () if name in hints and",
        "test_report_command.py",
    ),
    Bug("lab/memory.py", "    if needed > (there", "    if needed >= (there", _READING),
    Bug("lab/memory.py", '"damped": 4}', '"damped": 12}', _READING),
    Bug(
        "lab/cli.py",
        "if isinstance(end.__context__, BrokenPipeError):",
        "if False:",
        "test_cli_ends.py",
    ),
    Bug(
        "lab/train.py",
        "max(time.perf_counter() - clock, 1e-9)",
        "time.perf_counter() - clock",
        _READING,
    ),
    Bug(
        "lm/text/token_file.py",
        ">= self._vocabulary:",
        "> self._vocabulary + 1:",
        "lm/test_prepared.py",
    ),
    Bug(
        "lm/text/prepared.py",
        "if wanted.get(name) != digest]",
        "if name not in wanted]",
        _READING,
    ),
    Bug("lm/text/prepared.py", "for _ in range(ATTEMPTS):", "for _ in range(1):", _READING),
]
