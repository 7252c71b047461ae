"""The forms with Docker: the same verbs, handed to Compose."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.daytwo.rotation import NEW_PASSWORD

from . import mounted
from .places import ROOT, places
from .start import engine_words

ONE_SHOTS = ("init", "model")
# In a container: whether a secret was written after its first process had read them all.
OUTDATED = (
    "import os,time;ticks=int(open('/proc/1/stat').read().rpartition(')')[2].split()[19]);"
    "age=float(open('/proc/uptime').read().split()[0])-ticks/os.sysconf('SC_CLK_TCK');"
    "written=max(one.stat().st_mtime for one in os.scandir('/run/secrets') if one.is_file());"
    "print('outdated' if written>time.time()-age else 'current')"
)
PROJECT = "appliance"  # the name in compose.yaml


class ComposeError(Exception):
    """Compose could not do it; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One project: its files and the environment that fills them in."""

    files: tuple[str, ...]
    environment: Mapping[str, str]

    def argv(self, *words: str) -> list[str]:
        """`docker compose` with our files."""
        chosen = [part for file in self.files for part in ("-f", str(ROOT / file))]
        return ["docker", "compose", "--project-directory", str(ROOT), *chosen, *words]

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run and take the output."""
        return subprocess.run(
            self.argv(*words), env=dict(self.environment), capture_output=True, text=True, check=False, cwd=ROOT
        )

    def show(self, *words: str) -> int:
        """Run with its output on the terminal; its exit status."""
        return subprocess.run(self.argv(*words), env=dict(self.environment), check=False, cwd=ROOT).returncode

    def services(self) -> list[dict[str, Any]]:
        """Every container of the project: Service, State, Health, ExitCode."""
        done = self.ask("ps", "--all", "--format", "json")
        if done.returncode != 0:
            raise ComposeError(_last(done.stderr))
        # Newer versions print one object a line, older ones a list.
        text = done.stdout.strip()
        if text.startswith("["):
            listed = json.loads(text)
            assert isinstance(listed, list)
            return listed
        return [json.loads(line) for line in text.splitlines()]

    def running(self) -> bool:
        """Whether containers of this project are up."""
        return any(container.get("State") == "running" for container in self.services())

    def complaints(self) -> list[str]:
        """What is not as it should be, a line each; none when everything runs and says that it is well."""
        kept = {one["Service"]: one for one in self.services() if one["Service"] not in ONE_SHOTS}
        if "gateway" not in kept:  # what only watches is no appliance
            return ["the gateway was never started, or is removed (make up)"]
        return [
            f"{name} is {one['State']}, {one.get('Health') or 'without a health check'} (docker logs {one.get('Name')})"
            for name, one in sorted(kept.items())
            if one["State"] != "running" or one.get("Health") not in {"healthy", ""}
        ]

    def keys(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """`gateway keys …` inside the gateway's container."""
        return self.ask("exec", "-T", "gateway", "gateway", "keys", *words)

    def up(self, *services: str) -> int:
        """Start what is missing and replace what changed, in its definition or in the files it reads."""
        where, now = places(self.environment), mounted.digests()
        now = {name: digest for name, digest in now.items() if not services or name in services}
        running = {one["Service"] for one in self.services() if one["State"] == "running"}
        outdated = sorted(mounted.stale(where, now) & running)
        if outdated and (code := self.show("up", "--detach", "--no-deps", "--force-recreate", *outdated)) != 0:
            return code
        code = self.show("up", "--detach", *services)
        if code == 0:
            mounted.note(where, now)
        return code

    def start(self, say: Any, seconds: float) -> float:
        """Build, start, and wait until all is healthy; the seconds it took. Raises `ComposeError`."""
        started = time.monotonic()
        if self.show("build") != 0:
            raise ComposeError("an image could not be built (its reason stands above)")
        # The one-shots first, so that a bad certificate or an unknown model ends it before a service runs.
        for one_shot in ONE_SHOTS:
            if self.show("run", "--rm", one_shot) != 0:
                raise ComposeError(f"`{one_shot}` failed (its reason stands above)")
        if self.up() != 0:
            raise ComposeError("the services could not be started (the reason stands above)")
        self._renew_secrets(say)
        self._wait(say, started, seconds)
        self._set_password()
        return time.monotonic() - started

    def _renew_secrets(self, say: Any) -> None:
        """Restarts who runs on secrets that `init` has written anew since: to Compose nothing has changed."""
        asked = {name: self.ask("exec", "-T", name, "python3", "-c", OUTDATED) for name in ("vllm", "gateway")}
        outdated = [name for name, done in asked.items() if done.stdout.strip() == "outdated"]
        if outdated:
            say(f"secrets have changed: restarting {' and '.join(outdated)}")
            if self.show("restart", "--no-deps", *outdated) != 0:
                raise ComposeError("the services could not be restarted (the reason stands above)")

    def _set_password(self) -> None:
        """Grafana's password is the given one, also where its database already had another."""
        password = self.environment.get("GRAFANA_ADMIN_PASSWORD", "").strip()
        if not password or not any(one["Service"] == "grafana" for one in self.services()):
            return
        done = subprocess.run(
            self.argv(*NEW_PASSWORD), env=dict(self.environment), input=password, capture_output=True, text=True,
            check=False, cwd=ROOT,
        )  # fmt: skip
        if done.returncode != 0:
            raise ComposeError(f"GRAFANA_ADMIN_PASSWORD could not be set: {_last(done.stderr)}")

    def _wait(self, say: Any, started: float, seconds: float) -> None:
        shown, told_at = "", 0.0
        while True:
            elapsed = time.monotonic() - started
            containers = {one["Service"]: one for one in self.services()}
            waiting = [
                name
                for name, one in containers.items()
                if name not in ONE_SHOTS and (one["State"] != "running" or one.get("Health") not in {"healthy", ""})
            ]
            if not waiting:
                return
            dead = [name for name in waiting if containers[name]["State"] in {"exited", "dead"}]
            if dead:
                raise ComposeError(f"{dead[0]} ended:\n{self.ask('logs', '--tail', '15', dead[0]).stdout}")
            engine = self._engine_status()
            if engine.startswith("failed"):
                raise ComposeError(f"the engine {engine}\n{self.ask('logs', '--tail', '15', 'vllm').stdout}")
            now = f"waiting for {', '.join(sorted(waiting))}; engine: {engine}"
            if now != shown or time.monotonic() - told_at > 30:
                say(f"{elapsed:4.0f} s  {now}")
                shown, told_at = now, time.monotonic()
            if elapsed > seconds:
                raise ComposeError(f"not healthy after {elapsed:.0f} s (UP_SECONDS): {', '.join(sorted(waiting))}")
            time.sleep(1)

    def _engine_status(self) -> str:
        probe = "import urllib.request as u;print(u.urlopen('http://127.0.0.1:8001/status',timeout=3).read().decode())"
        done = self.ask("exec", "-T", "vllm", "python3", "-c", probe)
        try:
            told = json.loads(done.stdout)
        except ValueError:
            return "starting"
        return engine_words(told)

    def copy_certificate(self, to: Path) -> None:
        """The served certificate, without its key, out of the edge's container."""
        to.parent.mkdir(parents=True, exist_ok=True)
        done = self.ask("cp", "nginx:/etc/edge/certificates/fullchain.pem", str(to))
        if done.returncode != 0:
            raise ComposeError(f"the certificate cannot be copied: {_last(done.stderr)}")


def files_of_project(environment: Mapping[str, str]) -> list[str]:
    """The Compose files from which this checkout's containers were started by hand; none where there are none."""
    project = environment.get("COMPOSE_PROJECT_NAME", "").strip() or PROJECT
    named, files = "com.docker.compose.project", "com.docker.compose.project.config_files"
    argv = ["docker", "ps", "--all", "--filter", f"label={named}={project}", "--format", f'{{{{.Label "{files}"}}}}']
    try:
        done = subprocess.run(argv, env=dict(environment), capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    return lines[0].split(",") if lines else []


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
