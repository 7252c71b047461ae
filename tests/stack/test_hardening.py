"""The running appliance, looked at by an attacker: from outside, from its engine, and in what Docker shows of it."""

import json
import re
import socket
import ssl

import pytest
from tests.stack.appliance import REPOSITORY, Appliance
from tests.stack.edge import Edge

pytestmark = pytest.mark.timeout(3600)

# Services that run as root, with what for. Whoever adds one says why here and in docs/security.md.
ROOT = {
    "init": "makes files for other users' ids",
    "certificate-keeper": "reads a key file that may belong to root alone",
    "promtail": "its images know no other user",
    "docker-socket-proxy": "only root owns the socket on every machine",
}
CAPABILITIES = {
    "init": {"CHOWN", "DAC_OVERRIDE", "FOWNER"},
    "certificate-keeper": {"CHOWN", "DAC_OVERRIDE", "FOWNER"},
}
CLOSED_ROUTES = (
    "/metrics", "/admin/keys", "/admin/usage", "/invocations", "/ping", "/tokenize", "/detokenize", "/load", "/version",
    "/server_info", "/collective_rpc", "/sleep", "/pause", "/resume", "/docs", "/openapi.json", "/kv_event_sources",
    "/v2/rerank", "/inference/v1/generate", "/stub_status", "/v1/../metrics", "/v1/%2e%2e/metrics", "//metrics",
    "/v1/load_lora_adapter", "/debug/pprof", "/.env", "/pooling", "/classify",
)  # fmt: skip


def described(appliance: Appliance) -> dict[str, dict[str, object]]:
    """compose.yaml as Compose understands it, also the services that cannot start here."""
    return dict(json.loads(appliance.compose("config", "--format", "json"))["services"])


def test_only_the_edge_is_published_to_the_world(appliance: Appliance) -> None:
    for name, service in described(appliance).items():
        for port in service.get("ports", []):  # type: ignore[attr-defined]
            if name != "nginx":
                assert port["host_ip"] == "127.0.0.1", f"{name} publishes {port}"
    assert {port["target"] for port in described(appliance)["nginx"]["ports"]} == {8080, 8443}  # type: ignore[attr-defined]
    for name in ("gateway", "vllm", "gpu-exporter"):
        assert not appliance.inspect(name)["HostConfig"]["PortBindings"]  # type: ignore[index]


def test_no_container_has_more_than_it_needs(appliance: Appliance) -> None:
    for name, service in described(appliance).items():
        uid = str(service.get("user", "")).partition(":")[0]
        assert uid, f"{name} leaves its user to the image"
        assert uid != "0" or name in ROOT, f"{name} runs as root"
        assert service.get("read_only") is True, f"{name} can write to its root"
        assert service.get("cap_drop") == ["ALL"], name
        assert set(service.get("cap_add", [])) == CAPABILITIES.get(name, set()), name  # type: ignore[call-overload]
        assert "no-new-privileges:true" in service.get("security_opt", []), name  # type: ignore[operator]
        assert not service.get("privileged"), name
        assert service.get("pids_limit"), f"{name} may fork without end"
        assert service.get("mem_limit"), f"{name} may take all memory"
        assert "network_mode" not in service or service["network_mode"] == "none", name
        assert service["logging"]["options"]["max-size"], f"{name}'s log may fill the disk"  # type: ignore[index]


def test_the_kernel_agrees(appliance: Appliance) -> None:
    """What holds inside the running processes, not what the file asks for."""
    for name in ("nginx", "gateway", "vllm", "gpu-exporter", "prometheus"):
        status = appliance.exec(name, "cat", "/proc/self/status")
        facts = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
        assert facts["Uid"].split()[0] != "0", name
        assert int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0, name
        assert facts["NoNewPrivs"] == "1", name
        refused = appliance.exec(name, "sh", "-c", "echo x >/marker && echo wrote; true")
        assert "wrote" not in refused, f"{name} wrote to its root"


def test_the_docker_socket_is_behind_the_filter_only(appliance: Appliance) -> None:
    for name, service in described(appliance).items():
        sources = [str(mount.get("source")) for mount in service.get("volumes", [])]  # type: ignore[attr-defined]
        assert name == "docker-socket-proxy" or not any("docker.sock" in one for one in sources), name
    proxy = described(appliance)["docker-socket-proxy"]
    allowed = [word for word in proxy["command"] if word.startswith("-allow")]  # type: ignore[attr-defined]
    assert not any(word.startswith(("-allowPOST", "-allowPUT", "-allowDELETE")) for word in allowed)
    assert set(proxy["networks"]) == {"docker-api"}  # type: ignore[call-overload]


WAY_OUT = """
import socket, sys
found = []
for address in ("1.1.1.1", "8.8.8.8", "192.0.2.1", "169.254.169.254"):
    for kind, port in ((socket.SOCK_STREAM, 443), (socket.SOCK_STREAM, 53)):
        probe = socket.socket(socket.AF_INET, kind)
        probe.settimeout(2)
        try:
            probe.connect((address, port))
            found.append((address, port))
        except OSError as problem:
            if isinstance(problem, TimeoutError):
                found.append((address, port, "a packet went somewhere"))
        finally:
            probe.close()
for name in ("huggingface.co", "example.com"):
    try:
        socket.getaddrinfo(name, 443)
        found.append(name)
    except OSError:
        pass
print(found)
"""


def test_the_engine_has_no_way_out(appliance: Appliance) -> None:
    assert appliance.exec("vllm", "python3", "-c", WAY_OUT).strip() == "[]"
    routes = appliance.exec("vllm", "cat", "/proc/net/route").splitlines()[1:]
    assert not [line for line in routes if line.split()[1] == "00000000"], "the engine has a default route"
    assert set(appliance.inspect("vllm")["NetworkSettings"]["Networks"]) == {f"{appliance.project}_engine"}  # type: ignore[index]


def test_nginx_cannot_reach_the_engine(appliance: Appliance) -> None:
    address = appliance.inspect("vllm")["NetworkSettings"]["Networks"][f"{appliance.project}_engine"]["IPAddress"]  # type: ignore[index]

    def reached(url: str) -> str:
        return appliance.exec("nginx", "sh", "-c", f"wget -q -T 10 -t 1 -O /dev/null {url} && echo in; true").strip()

    assert reached("http://gateway:8080/health") == "in", "the probe itself works"
    assert reached(f"http://{address}:8000/health") == ""


def test_what_is_open_in_the_engine_is_closed_at_the_edge(appliance: Appliance) -> None:
    for route in CLOSED_ROUTES:
        for method in ("GET", "POST"):
            answer = appliance.edge.call(method, route, {} if method == "POST" else None)
            assert answer.status in (400, 404, 405), f"{method} {route}: {answer.status} {answer.text[:200]}"
            assert "vllm" not in answer.text.lower()


def secrets_inside(appliance: Appliance) -> dict[str, str]:
    """The appliance's internal secrets, read as root on the machine could."""
    script = "from pathlib import Path\nfor p in Path('/run/secrets').iterdir(): print(p.name, p.read_text())"
    lines = appliance.exec("gateway", "python3", "-c", script).split("\n")
    found = dict(line.split(" ", 1) for line in lines if " " in line)
    assert {"vllm_api_key", "gateway_admin_key"} <= set(found)
    return {**found, "caller's key": appliance.key}


def test_no_secret_in_what_docker_shows(appliance: Appliance) -> None:
    assert appliance.edge.chat(tokens=4).status == 200
    hidden = secrets_inside(appliance)
    names = [name for name in appliance.services() if name not in ("init", "model")]
    for name in names:
        shown = json.dumps(appliance.inspect(name))
        arguments, environments = (
            appliance.exec(name, "sh", "-c", f"cat /proc/*/{what} 2>/dev/null | tr '\\0' '\\n'")
            for what in ("cmdline", "environ")
        )
        history = appliance.docker("history", "--no-trunc", str(appliance.inspect(name)["Image"]))
        for what, secret in hidden.items():
            assert secret not in shown, f"{what} in inspect of {name}"
            assert secret not in arguments, f"{what} in the arguments of a process of {name}"
            # vLLM takes its key by argument (which it would log) or by environment (its own user alone can read it).
            if (name, what) != ("vllm", "vllm_api_key"):
                assert secret not in environments, f"{what} in the environment of a process of {name}"
            assert secret not in history, f"{what} in the image of {name}"
    logs = appliance.logs()
    assert '"event"' in logs
    for what, secret in hidden.items():
        assert secret not in logs, f"{what} in a log"
    assert "capital of France" not in logs, "a prompt in a log"


def test_secrets_on_disk_belong_to_one_user(appliance: Appliance) -> None:
    for name in ("gateway", "vllm"):
        listed = appliance.exec(name, "sh", "-c", "stat -c '%a %u %n' /run/secrets/*").splitlines()
        assert listed
        for line in listed:
            mode, uid, _ = line.split(" ", 2)
            assert int(mode, 8) & 0o077 == 0, line
            assert uid == "10001", line
    assert "gateway_admin_key" not in appliance.exec("vllm", "ls", "/run/secrets")


def handshake(port: int, **limits: object) -> tuple[str, str] | None:
    """Protocol and cipher of a handshake with these limits; None when the server refuses."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers(str(limits.get("ciphers", "ALL:@SECLEVEL=0")))
    context.minimum_version = limits.get("least", ssl.TLSVersion.MINIMUM_SUPPORTED)  # type: ignore[assignment]
    context.maximum_version = limits.get("most", ssl.TLSVersion.MAXIMUM_SUPPORTED)  # type: ignore[assignment]
    if curve := limits.get("curve"):
        context.set_ecdh_curve(str(curve))
    try:
        with socket.create_connection(("127.0.0.1", port), 60) as plain, context.wrap_socket(plain) as secured:
            return str(secured.version()), str(secured.cipher()[0])  # type: ignore[index]
    except OSError:
        return None


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")  # offering old protocols is the test
def test_tls_offers_what_is_strong_and_nothing_else(appliance: Appliance) -> None:
    port = appliance.edge.port
    assert handshake(port, least=ssl.TLSVersion.TLSv1_3)
    assert handshake(port, most=ssl.TLSVersion.TLSv1_2)
    assert handshake(port, least=ssl.TLSVersion.TLSv1, most=ssl.TLSVersion.TLSv1_1) is None
    for weak in ("AES128-SHA", "AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-SHA", "DHE-RSA-AES128-GCM-SHA256", "CAMELLIA"):
        assert handshake(port, most=ssl.TLSVersion.TLSv1_2, ciphers=f"{weak}:@SECLEVEL=0") is None, weak
    strong = handshake(port, most=ssl.TLSVersion.TLSv1_2, ciphers="ECDHE-ECDSA-AES128-GCM-SHA256")
    assert strong == ("TLSv1.2", "ECDHE-ECDSA-AES128-GCM-SHA256")
    assert handshake(port, curve="prime256v1")
    assert handshake(port, curve="secp521r1") is None


def test_answers_tell_nothing_about_what_is_behind(appliance: Appliance) -> None:
    for answer in (
        appliance.edge.chat(tokens=4),
        appliance.edge.call("GET", "/nothing"),
        Edge("127.0.0.1", appliance.edge.port).chat(),
    ):
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"\d", answer.headers.get("server", "")), "a version in the Server header"
        assert not {"x-powered-by", "via", "x-upstream"} & set(answer.headers)
        if answer.status != 200:
            assert set(answer.json()["error"]) == {"message", "type", "code", "param"}  # type: ignore[call-overload]


def test_the_images_hold_no_build_tools_and_no_files_of_the_checkout(appliance: Appliance) -> None:
    for name in ("gateway", "gpu-exporter"):
        tools = "for tool in gcc cc make git ssh curl; do command -v $tool; done"
        files = "ls -a / /app | grep -E '^\\.(env|git|ssh)$'"
        found = appliance.exec(name, "sh", "-c", f"{tools}; {files}; true")
        assert found.strip() == "", f"{name} holds {found}"


INSTALLED = """
from importlib.metadata import distributions
for one in distributions():
    if str(one.locate_file("")).startswith("/usr/local"):
        print(one.name.lower().replace("_", "-"), one.version)
"""


def test_the_images_hold_what_is_locked_and_nothing_else(appliance: Appliance) -> None:
    """The bill of materials of an image is its lock file: same names, same versions, no extras."""
    for name in ("gateway", "gpu-exporter"):
        lock = (REPOSITORY / "requirements" / f"{name}.txt").read_text()
        locked = dict(re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", lock, re.MULTILINE))
        installed = dict(line.split() for line in appliance.exec(name, "python3", "-c", INSTALLED).splitlines())
        assert installed, name
        for package, version in installed.items():
            if package not in ("pip", "setuptools", "wheel"):  # the base image's own
                assert locked.get(package) == version, (
                    f"{name} holds {package} {version}; locked: {locked.get(package)}"
                )
