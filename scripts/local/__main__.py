"""`make`'s daily verbs: up, down, status, logs, stop, service NAME, monitoring up|down, keys …, preflight, where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

from services.init.settings import SettingsError

from . import containers, machine, mode, plan, preflight, running, settings, start, variables, welcome
from .containers import ComposeError, Stack
from .mode import Choice, ModeError
from .places import ROOT, Places, places
from .settings import LocalSettings
from .start import StartError, say
from .supervisor import Plan

MONITORING = ("prometheus", "alertmanager", "grafana", "jaeger", "loki", "docker-socket-proxy", "promtail")


class RefusedError(Exception):
    """Nothing was started; `problems` has one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def chosen(environment: dict[str, str]) -> tuple[Choice, machine.Docker]:
    """The form for this machine. Raises `ModeError`."""
    wanted = environment.get("MODE", "")
    docker = machine.Docker(False, "not asked") if wanted.strip().lower() == "local" else machine.docker()
    needed = 1
    for name, default in (("TP_SIZE", "2"), ("PP_SIZE", "1")):
        text = environment.get(name, "").strip() or default
        if not text.isdecimal() or int(text) < 1:
            raise ModeError(f"{name}={text!r} is not a number of GPUs")
        needed *= int(text)
    return mode.choose(wanted, docker, machine.gpus() if docker.reason is None else 0, needed), docker


def up(environment: dict[str, str]) -> int:
    """Start the form that suits this machine and wait until it answers."""
    choice, docker = chosen(environment)
    say(f"mode {choice.mode}: {choice.why}" + ("" if environment.get("MODE") else " (MODE=gpu|cpu|local overrides)"))
    return up_local(settings.read(environment)) if choice.mode == "local" else up_compose(choice, docker, environment)


def up_local(local: LocalSettings) -> int:
    """The path as processes of this machine."""
    found = running.running(local.places)
    if found is not None and found.supervisor is not None:
        say("it runs already (make status, make down)")
        return 0
    running.stop(local.places)  # what a killed supervisor left
    problems = preflight.local(local)
    if problems:
        raise RefusedError(problems)
    nginx = start.nginx_program()
    start.prepare(local)
    start.engine_parts(local)
    kept = plan.whole(local, nginx)
    supervisor = None
    try:
        start.edge_files(local, kept)
        if any(service.name == "prometheus" for service in kept.services):
            start.prometheus_files(local)
        supervisor = start.launch(local.places, kept)
        seconds = start.wait_ready(local, supervisor)
        _remember(local.places, Choice("local", ""))
        key = welcome.first_key(_local_keys(local))  # last: it is shown once, so nothing may fail between
    except BaseException:
        start.cleaned(local.places, supervisor)
        raise
    more = {"Logs": str(local.places.logs)}
    if any(service.name == "prometheus" for service in kept.services):
        more["Metrics"] = f"http://127.0.0.1:{local.ports.prometheus}"
    say(f"ready after {seconds:.0f} s")
    served = local.environment.get("SERVED_MODEL_NAME", "").split(",")[0].strip() or local.model
    print(welcome.text(welcome.address(local.ports.https, local.places.trusted), served, key, more))
    return 0


def up_compose(choice: Choice, docker: machine.Docker, environment: dict[str, str]) -> int:
    """The path as containers."""
    stack = Stack(tuple(choice.files), environment)
    where = places(environment)
    own = ROOT / os.path.expanduser(environment.get("CERTIFICATES_DIR", "").strip() or "certificates")
    problems = preflight.compose(choice.mode, environment, docker, own, stack.running())
    checked = stack.ask("config", "--quiet")
    problems += [line for line in checked.stderr.splitlines() if line.strip()] if checked.returncode else []
    if problems:
        raise RefusedError(problems)
    ran_before = stack.running()
    try:
        seconds = stack.start(say, float(environment.get("UP_SECONDS", "").strip() or 3600))
        stack.copy_certificate(where.trusted)
        _remember(where, choice)
        key = welcome.first_key(stack.keys)  # last: it is shown once, so nothing may fail between
    except BaseException:
        if not ran_before:  # what ran before goes on; what we began does not stay half-started
            stack.ask("down", "--timeout", "30")
            where.deployed.unlink(missing_ok=True)
        raise
    port = {name: environment.get(f"{name}_PORT", "").strip() for name in ("HTTPS", "GRAFANA", "PROMETHEUS", "JAEGER")}
    more = {
        "Grafana": f"http://127.0.0.1:{port['GRAFANA'] or 3000}",
        "Metrics": f"http://127.0.0.1:{port['PROMETHEUS'] or 9090}",
        "Traces": f"http://127.0.0.1:{port['JAEGER'] or 16686}",
    }
    say(f"ready after {seconds:.0f} s")
    model = _served_model(stack)
    reached = welcome.address(int(port["HTTPS"] or 443), where.trusted, _public(environment))
    print(welcome.text(reached, model, key, more))
    return 0


def down(environment: dict[str, str], verb: str = "down") -> int:
    """Stop everything and leave no process, port or network. `verb`: how the user called it."""
    where = places(environment)
    stack = _deployed(where, environment)
    code = stack.show("down") if stack else 0
    for name in (running.NAME, "monitoring"):
        forced = running.stop(where, name)
        if forced:
            print(f"{verb}: had to end by force: {', '.join(forced)}")
    if code == 0:
        where.deployed.unlink(missing_ok=True)
        print(f"{verb}: everything is stopped")
    return code


def stop(environment: dict[str, str]) -> int:
    """Containers stay and are only stopped; processes of local mode end."""
    stack = _deployed(places(environment), environment)
    return stack.show("stop") if stack else down(environment, "stop")


def status(environment: dict[str, str]) -> int:
    """What runs; 0 exactly when the appliance does."""
    where = places(environment)
    stack = _deployed(where, environment)
    if stack:
        stack.show("ps", "--all")
        complaints = stack.complaints()
        for complaint in complaints:
            print(f"status: {complaint}")
        return 1 if complaints else 0
    found = running.running(where)
    if found is None or found.supervisor is None:
        print("status: nothing runs (make up)")
        return 1
    alive = found.alive()
    for name, restarts in found.restarts().items():
        process = alive.get(name)
        what = f"running, pid {process.pid}" if process else f"not running (exit {found.last_exit(name)})"
        print(f"  {name:<13} {what}" + (f", restarted {restarts} times" if restarts else ""))
    local = settings.read({**environment, **{name: str(port) for name, port in found.ports.items()}})
    ready, body = start.get(f"http://127.0.0.1:{local.ports.gateway}/ready")
    why = body.decode(errors="replace").strip() or "no answer"
    print(f"  ready         {'yes' if ready == 200 else f'no: {why}'}")
    print(f"  API           https://127.0.0.1:{local.ports.https}/v1    logs: {where.logs}")
    return 0 if ready == 200 and set(alive) == set(found.restarts()) else 1


def logs(environment: dict[str, str]) -> int:
    """Follow all logs."""
    where = places(environment)
    stack = _deployed(where, environment)
    if stack:
        return stack.show("logs", "--follow", "--tail", "50")
    files = sorted(where.logs.glob("*.log"))
    if not files:
        print("logs: there are none yet (make up)", file=sys.stderr)
        return 1
    return subprocess.run(["tail", "-n", "20", "-F", *files], check=False).returncode


def service(environment: dict[str, str], name: str) -> int:
    """One service in the foreground, with this machine's settings; it replaces this process."""
    local = settings.read(environment)
    if name == "vllm":
        start.prepare(local)
        if not machine.gpus():
            start.engine_parts(local)
        os.execve(plan.BIN / "engine", ["engine", "serve"], plan.engine_environment(local))
    if name == "gateway":
        start.prepare(local)
        os.execve(plan.BIN / "gateway", ["gateway", "serve"], plan.gateway_environment(local))
    if name == "gpu-exporter":
        os.execve(plan.BIN / "gpu-exporter", ["gpu-exporter"], environment)
    raise RefusedError([f"no such service: {name} (vllm, gateway, gpu-exporter)"])


def monitoring(environment: dict[str, str], verb: str) -> int:
    """The services that watch, without the path: with Docker all of them, else Prometheus alone."""
    docker = machine.Docker(False, "not asked") if environment.get("MODE") == "local" else machine.docker()
    if docker.reason is None:
        choice = mode.choose(environment.get("MODE", ""), docker, machine.gpus(), 1)
        stack = Stack(tuple(choice.files), environment)
        return stack.up(*MONITORING) if verb == "up" else stack.show("stop", *MONITORING)
    local = settings.read(environment)
    if verb == "down":
        running.stop(local.places, "monitoring")
        return 0
    watching = plan.prometheus(local)
    if watching is None:
        raise RefusedError(
            [f"monitoring needs Docker ({docker.reason}); for Prometheus alone: apt-get install prometheus"]
        )
    taken = machine.port_taken(local.ports.prometheus, "127.0.0.1")
    if taken:
        raise RefusedError([f"port {local.ports.prometheus} (PROMETHEUS_PORT) cannot be used: {taken}"])
    start.prepare(local)
    start.prometheus_files(local)
    kept = Plan(str(local.places.state), [watching], None, {"PROMETHEUS_PORT": local.ports.prometheus})
    start.launch(local.places, kept, "monitoring")
    print(
        f"monitoring: Prometheus on http://127.0.0.1:{local.ports.prometheus}; "
        "Grafana, Jaeger, Loki and Promtail need Docker"
    )
    return 0


def keys(environment: dict[str, str], *words: str) -> int:
    """`gateway keys …` where the appliance's database is."""
    stack = _deployed(places(environment), environment)
    if stack:
        return stack.show("exec", "gateway", "gateway", "keys", *words)
    local = settings.read(environment)
    if not local.places.gateway_data.is_dir():  # a key made in a database of our own would open nothing
        raise RefusedError(["no appliance found: `make up` starts one"])
    argv = [str(plan.BIN / "gateway"), "keys", *words]
    return subprocess.run(argv, env=plan.gateway_environment(local, secrets=False), check=False).returncode


def located(environment: dict[str, str], what: str) -> int:
    """For programs that call the appliance: `state` is its folder, `edge` its URL and the certificate to trust."""
    where = places(environment)
    if what == "state":
        print(where.state)
        return 0
    stack = _deployed(where, environment)
    if stack is None:
        found = running.running(where)
        ports = found.ports if found else {}
        local = settings.read({**environment, **{name: str(port) for name, port in ports.items()}})
        port, certificate, public = local.ports.https, where.certificates / "fullchain.pem", None
    else:
        port, certificate = int(environment.get("HTTPS_PORT", "").strip() or 443), where.trusted
        public = _public(environment)
        if public is None:
            stack.copy_certificate(certificate)  # as it is now: it may have been renewed since `make up`
    if public is None and not certificate.is_file():
        raise RefusedError(["no appliance found: `make up` starts one"])
    print(welcome.address(port, certificate, public).url)
    print("" if public else certificate)
    return 0


def check(environment: dict[str, str]) -> int:
    """Only the preflight: what would stand in the way of `make up`."""
    choice, docker = chosen(environment)
    print(f"preflight: mode {choice.mode}: {choice.why}")
    if choice.mode == "local":
        problems = preflight.local(settings.read(environment))
    else:
        own = ROOT / (environment.get("CERTIFICATES_DIR", "").strip() or "certificates")
        running_now = Stack(tuple(choice.files), environment).running()
        problems = preflight.compose(choice.mode, environment, docker, own, running_now)
    if problems:
        raise RefusedError(problems)
    print("preflight: nothing stands in the way")
    return 0


def _local_keys(local: LocalSettings) -> welcome.Keys:
    def keys(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [plan.BIN / "gateway", "keys", *words],
            env=plan.gateway_environment(local),
            capture_output=True,
            text=True,
            check=False,
        )

    return keys


def _public(environment: dict[str, str]) -> str | None:
    """The host name with a certificate of Let's Encrypt, if that is how the appliance is reached."""
    hosts = [host.strip() for host in environment.get("APPLIANCE_HOSTS", "").split(",") if host.strip()]
    return hosts[0] if hosts and environment.get("LETSENCRYPT_EMAIL", "").strip() else None


def _served_model(stack: Stack) -> str:
    """The model's name as the engine serves it."""
    probe = (
        "import json,urllib.request as u;k=open('/run/secrets/vllm_api_key').read().strip();"
        "r=u.Request('http://vllm:8000/v1/models',headers={'Authorization':'Bearer '+k});"
        "print(json.load(u.urlopen(r,timeout=5))['data'][0]['id'])"
    )
    done = stack.ask("exec", "-T", "gateway", "python3", "-c", probe)
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "MODEL"


def _remember(where: Places, choice: Choice) -> None:
    described = subprocess.run(
        ["git", "describe", "--tags", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    told = {"commit": described.stdout.strip() or None, "mode": choice.mode, "files": choice.files}
    where.state.mkdir(parents=True, exist_ok=True)
    where.deployed.write_text(json.dumps(told) + "\n")


def _deployed(where: Places, environment: dict[str, str]) -> Stack | None:
    """The project that `make up` started last, or that `docker compose up` did; None for local mode, or nothing."""
    try:
        told = json.loads(where.deployed.read_text())
        files = [str(file) for file in told["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        asked = environment.get("MODE", "").strip().lower() != "local"
        files = containers.files_of_project(environment) if asked else []
    return Stack(tuple(files), environment) if files else None


VERBS: dict[str, Callable[..., int]] = {
    "up": up, "down": down, "stop": stop, "status": status, "logs": logs, "service": service,
    "monitoring": monitoring, "keys": keys, "preflight": check, "where": located,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """0 when done; 2 for what the operator can mend, a line each; 1 for a start that failed; 130 when stopped."""
    verb = argv[0] if argv else ""
    if verb not in VERBS:
        print(f"usage: scripts/local {'|'.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](variables.load(os.environ), *argv[1:])
    except (variables.VariablesError, SettingsError, RefusedError) as bad:
        for problem in bad.problems:
            print(f"{verb}: {problem}", file=sys.stderr)
        return 2
    except ModeError as bad:
        print(f"{verb}: {bad}", file=sys.stderr)
        return 2
    except (StartError, ComposeError, welcome.FirstKeyError) as failed:
        print(f"{verb}: {failed}", file=sys.stderr)
        return 1
    except OSError as failed:  # a full disk, a folder of somebody else, a program that is missing
        print(f"{verb}: {failed.filename or 'writing'}: {failed.strerror or failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{verb}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
