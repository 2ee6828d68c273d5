"""Clients that are slow to install, in their real packages, against a server: what works.

    python benchmarks/clients.py --model demo
    python benchmarks/clients.py --only llm,codex --keep /tmp/clients

Each is installed into a folder of its own, which is removed again, and runs a short program there.
The table says what came of it. Those that npm installs are left out where it is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from client_programs import LONG, NAME, PIP_CLIENTS, Client
from client_programs_npm import NPM_CLIENTS
from common import serving
from tried_server import calling_model

from m7mlx.files.hub import resolve

CLIENTS = PIP_CLIENTS | NPM_CLIENTS
_MOST = 256  # tokens of an answer


def main() -> None:
    """Try the clients and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a Hub repository or an alias (%(default)s)")
    parser.add_argument("--only", help="some of them, with commas between: " + ", ".join(CLIENTS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where what is installed lies and stays")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(CLIENTS)
    model = resolve(args.model).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        long = calling_model(Path(scratch))
        options = ["--model", str(model), "--name", NAME, "--model", str(long), "--name", LONG]
        with serving(*options, "--prefix-disk", "0", "--max-tokens", str(_MOST)) as (url, _):
            print("| client | version | result |\n| --- | --- | --- |")
            for name in names:
                place = (args.keep or Path(scratch)).absolute() / re.sub(r"\W+", "-", name)
                version, result = _tried(CLIENTS[name], place, url, model)
                print(f"| {name} | {version} | {result} |", flush=True)


def _tried(client: Client, place: Path, url: str, model: Path) -> tuple[str, str]:
    """The version that was installed, and what came of its program."""
    place.mkdir(parents=True, exist_ok=True)
    if why := _install(client, place):
        return "–", f"not tried: {why}"
    values = {"url": url, "folder": model, "place": place, "support": Path(__file__).parents[1] / "tests" / "support"}
    program = re.sub(r"\{(url|folder|place|support)\}", lambda found: str(values[found[1]]), client.program)
    file = place / ("program.mjs" if client.is_script else "program.py")
    file.write_text(program)
    command = ["node" if client.is_script else str(_python(client, place)), str(file)]
    folder = place / "work"
    folder.mkdir(exist_ok=True)
    homes = {"HOME": str(place), "LLM_USER_PATH": str(place / "llm"), "VIBE_HOME": str(place / "vibe")}
    env = homes | {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": "" if client.installer else os.environ.get("PYTHONPATH", ""),
    }
    where = place if client.is_script else folder
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=where)
    return _version(client, place), "works" if not done.returncode else f"fails: {_last(done.stderr)}"


def _python(client: Client, place: Path) -> Path:
    return place / "bin" / "python" if client.installer == "pip" else Path(sys.executable)


def _install(client: Client, place: Path) -> str:
    """Install a client where it is not; return why that failed."""
    packages = client.packages.split()
    if not client.installer:
        return "" if importlib.util.find_spec(packages[0]) else f"{packages[0]} is not installed here"
    if client.installer == "npm":
        if not shutil.which("npm"):
            return "there is no npm here"
        if (place / "node_modules").exists():
            return ""
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(place), *packages]
    else:
        if _python(client, place).exists():
            return ""
        for python in ("python3.12", sys.executable):  # some of them need the first
            if shutil.which(python):
                made = subprocess.run([python, "-m", "venv", str(place)], capture_output=True, text=True)
                if not made.returncode:
                    break
        else:
            return _last(made.stderr)
        # Not pip itself, which cannot leave out what a package says that it needs.
        found = subprocess.run(
            [_python(client, place), "-m", "pip", "install", "-q", "uv"], capture_output=True, text=True
        )
        if found.returncode:
            return _last(found.stderr)
        nowhere = place / "left-out.txt"
        nowhere.write_text("\n".join(f'{name}; sys_platform == "nowhere"' for name in client.left_out.split()))
        command = [str(_python(client, place)), "-m", "uv", "pip", "install", "-q", "--native-tls"]
        command += ["--python", str(_python(client, place)), "--override", str(nowhere), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    return _last(done.stderr) if done.returncode else ""


def _version(client: Client, place: Path) -> str:
    package = client.packages.split()[0].partition("[")[0]
    if client.installer == "npm":
        text = (place / "node_modules" / package / "package.json").read_text()
        found = re.search(r'"version": "(.+?)"', text)
    else:
        command = [str(_python(client, place)), "-m", "pip", "show", package]
        found = re.search(r"^Version: (.+)$", subprocess.run(command, capture_output=True, text=True).stdout, re.M)
    return found[1] if found else "–"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200].replace("|", "/") if lines else "without a word"


if __name__ == "__main__":
    main()
