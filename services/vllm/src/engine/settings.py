"""The engine's configuration: one field a variable, read once, frozen; the only place with defaults.

Every problem is reported at once with the variable's name and the fix. Unknown `ENGINE_*` and `VLLM_*` names are errors
with the nearest match; the names that vLLM itself reads are known from a list recorded from it. Secrets also come by
`NAME_FILE`. Empty values count as not set.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Mapping
from importlib.resources import files
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine import embedded

GPU_MODEL = "Qwen/Qwen3-8B"  # ungated, instruct, and two 24 GB GPUs hold it with room for long contexts
SECRETS = ("vllm_api_key", "hf_token", "ray_token")
# Argv that this package writes itself: given again by hand, two places would decide.
MANAGED = frozenset(
    """
    --model --served-model-name --host --port --uds --api-key --middleware --tensor-parallel-size -tp
    --pipeline-parallel-size -pp --quantization -q --gpu-memory-utilization --max-model-len --max-num-seqs
    --max-num-batched-tokens --kv-cache-dtype --dtype --kv-offloading-size --enable-prefix-caching
    --no-enable-prefix-caching --chat-template --tool-call-parser --enable-auto-tool-choice --reasoning-parser
    --lora-modules --enable-lora --max-lora-rank --speculative-config --max-num-queued-reqs --max-num-queued-tokens
    --otlp-traces-endpoint --shutdown-timeout --enforce-eager --disable-custom-all-reduce
    --distributed-executor-backend --trust-remote-code --api-server-count --data-parallel-size -dp
    """.split()  # noqa: SIM905  # one word a flag reads better than quotes around each
)


class ConfigurationError(Exception):
    """The environment cannot be used; `problems` has one line each, naming the variable and the fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Settings(BaseSettings):
    """Everything that can be set, with units in the descriptions."""

    model_config = SettingsConfigDict(allow_inf_nan=False, frozen=True, extra="ignore", protected_namespaces=())

    # The model
    model_name: str | None = Field(
        None, description=f"Model: hub name, folder, or (default on CPU) {embedded.NAME}; on GPUs {GPU_MODEL}."
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit of the model on the hub.")
    model_cache_dir: Path = Field(Path(".state/models"), description="Folder that holds the models.")
    served_model_name: str | None = Field(None, description="Names callers use, comma-separated; the first is shown.")
    hf_token: SecretStr | None = Field(None, description="Token of the model hub, for gated models.")
    quantization: str | None = Field(None, description="Weight quantization (awq, fp8, …); unset: what the model says.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Type of unquantized weights.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    chat_template: Path | None = Field(None, description="File with a chat template that replaces the model's.")
    tool_call_parser: str | None = Field(None, description="Parser of tool calls; setting it turns tool choice on.")
    reasoning_parser: str | None = Field(None, description="Parser of reasoning content.")
    lora_modules: str | None = Field(None, description="LoRA adapters, comma-separated `name=folder`.")
    max_lora_rank: int = Field(16, ge=1, description="Largest rank among the adapters.")
    speculative_config: str | None = Field(None, description="Speculative decoding: vLLM's JSON.")

    # Parallelism and memory
    engine_device: Literal["gpu", "cpu"] | None = Field(None, description="Which build runs; unset: the one installed.")
    tp_size: int | None = Field(None, ge=1, description="GPUs that share each layer; default 2 on GPUs, 1 on CPU.")
    pp_size: int = Field(1, ge=1, description="Stages that split the layers.")
    distributed_executor: Literal["mp", "ray"] | None = Field(
        None, description="`ray` spans machines (docs/engine.md)."
    )
    engine_nodes: int = Field(1, ge=1, description="Machines that share the model through Ray (docs/engine.md).")
    ray_head_address: str | None = Field(None, description="First machine's address on the machines' private network.")
    ray_node_address: str | None = Field(None, description="This machine's own address on it.")
    ray_port: int = Field(6379, ge=1, le=65535, description="Port of the cluster on the first machine.")
    ray_token: SecretStr | None = Field(None, description="Secret that the machines of the cluster share.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of each GPU's memory vLLM takes.")
    max_model_len: str | None = Field(
        None, description="Longest context, tokens (8192, 32k, auto); unset: the model's."
    )
    max_num_seqs: int | None = Field(None, ge=1, description="Sequences computed at once.")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Tokens computed in one step.")
    kv_cache_dtype: str | None = Field(None, description="Type of the KV cache (fp8 halves it).")
    prefix_caching: bool = Field(True, description="Reuse the KV cache of equal prompt beginnings.")
    kv_offloading_gb: float | None = Field(
        None, ge=0, description="Host memory that holds evicted KV cache, GiB in all."
    )
    swap_space_gb: float | None = Field(
        None, ge=0, description="Old name: GiB per GPU; becomes KV_OFFLOADING_GB = this times the GPUs."
    )
    disable_custom_all_reduce: bool = Field(
        False, description="Use NCCL's all-reduce: for GPUs whose peer access lies."
    )
    engine_eager: bool = Field(False, description="Start without compiling: sooner up, slower tokens.")
    vllm_cpu_kvcache_space: int = Field(1, ge=1, description="KV cache of the CPU build, GiB.")
    max_num_queued_reqs: int = Field(512, ge=0, description="Calls in vLLM at once, 503 above; 0 = no wall.")
    max_num_queued_tokens: int = Field(0, ge=0, description="Prompt tokens waiting in vLLM, 503 above; 0 = no wall.")
    vllm_extra_args: str = Field("", description="More arguments for vLLM, as on a command line.")

    # Where it listens, and who watches
    vllm_host: str = Field("127.0.0.1", description="Address vLLM listens on.")
    vllm_port: int = Field(8000, ge=1, le=65535, description="Port vLLM listens on.")
    vllm_api_key: SecretStr | None = Field(None, description="Key vLLM expects from the gateway.")
    engine_status_host: str = Field("127.0.0.1", description="Address of the supervisor's status.")
    engine_status_port: int = Field(8001, ge=0, le=65535, description="Port of the supervisor's status; 0: a free one.")
    vllm_python: str | None = Field(None, description="Python that runs vLLM; default ENGINE_VENV's, else python3.")
    engine_venv: Path = Field(Path(".state/engine-venv"), description="Environment of vLLM's CPU build.")
    engine_state_dir: Path = Field(Path(".state/engine-cache"), description="Compile caches and evidence.")
    engine_start_seconds: float = Field(3600, gt=0, description="A start that takes longer is broken off, seconds.")
    engine_drain_seconds: int = Field(30, ge=0, description="Time running calls get after SIGTERM, seconds.")
    engine_hang_seconds: float = Field(
        10, ge=1, description="Silence that counts as a hang, beside the prefill, seconds."
    )
    engine_hang_most_seconds: float = Field(300, ge=1, description="The bound never grows beyond this, seconds.")
    engine_canary_seconds: float = Field(5, gt=0, description="Time between two canaries of an idle engine, seconds.")
    engine_restarts: int = Field(5, ge=0, description="Restarts within the window before the engine is failed.")
    engine_restart_window_seconds: float = Field(900, gt=0, description="That window, seconds.")

    # Telling
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe log line.")
    otel_exporter_otlp_endpoint: str | None = Field(
        None, description="OTLP collector of vLLM's traces; none = no traces."
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` passes in: the environment is read in one place."""
        return (init_settings,)

    @field_validator("max_model_len")
    @classmethod
    def _length(cls, value: str | None) -> str | None:
        if value is not None and value != "auto":
            digits = value[:-1] if value[-1:] in "kK" else value
            if not digits.isdecimal() or int(digits) == 0:
                raise ValueError("must be a number of tokens like 8192 or 32k, or auto")
        return value

    @field_validator("quantization")
    @classmethod
    def _known_method(cls, value: str | None) -> str | None:
        known = vllm_quantizations()
        if value is not None and value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"possible: {', '.join(sorted(known))}"
            raise ValueError(f"{value} is no quantization of this vLLM; {hint}")
        return value

    @field_validator("speculative_config")
    @classmethod
    def _json(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                valid = isinstance(json.loads(value), dict)
            except ValueError:
                valid = False
            if not valid:
                raise ValueError('must be a JSON object like {"method": "ngram", "num_speculative_tokens": 3}')
        return value

    @field_validator("lora_modules")
    @classmethod
    def _adapters(cls, value: str | None) -> str | None:
        for part in (value or "").split(","):
            if part.strip() and not all(part.strip().partition("=")[::2]):
                raise ValueError(f"must be name=folder pairs, not {part.strip()!r}")
        return value

    @field_validator("chat_template")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"no such file: {value}")
        return value

    @field_validator("vllm_extra_args")
    @classmethod
    def _extra(cls, value: str) -> str:
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into arguments: {error}") from None
        for word in words:
            if word.split("=")[0] in MANAGED:
                raise ValueError(f"{word.split('=')[0]} is set by a variable of its own (docs/engine.md)")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        problems = []
        if self.swap_space_gb and self.kv_offloading_gb:
            problems.append("SWAP_SPACE_GB and KV_OFFLOADING_GB say the same twice; keep KV_OFFLOADING_GB")
        if self.engine_hang_most_seconds < self.engine_hang_seconds:
            problems.append("ENGINE_HANG_MOST_SECONDS must not be below ENGINE_HANG_SECONDS")
        if self.vllm_port == self.engine_status_port:
            problems.append("VLLM_PORT and ENGINE_STATUS_PORT must differ")
        if self.engine_device == "cpu" and self.distributed_executor == "ray":
            problems.append("DISTRIBUTED_EXECUTOR=ray needs GPUs; the CPU build runs on one machine")
        if self.quantization and self.engine_device == "cpu" and self.quantization.startswith(("fp8", "modelopt")):
            problems.append(f"QUANTIZATION={self.quantization} needs a GPU; leave it out on CPU")
        problems += self._cluster_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _cluster_problems(self) -> list[str]:
        given = {name: getattr(self, name) for name in ("ray_head_address", "ray_node_address", "ray_token")}
        if not any(given.values()):
            if self.engine_nodes > 1:
                return ["ENGINE_NODES above 1 needs RAY_HEAD_ADDRESS, RAY_NODE_ADDRESS and RAY_TOKEN (docs/engine.md)"]
            return []
        problems = [f"{name.upper()} is missing; a cluster needs it" for name, value in given.items() if not value]
        if self.distributed_executor != "ray":
            problems.append("RAY_HEAD_ADDRESS needs DISTRIBUTED_EXECUTOR=ray")
        if self.engine_nodes < 2:
            problems.append("RAY_HEAD_ADDRESS needs ENGINE_NODES=2 or more: one machine needs no cluster")
        elif self.pp_size % self.engine_nodes:
            problems.append(
                f"PP_SIZE={self.pp_size} must be a multiple of ENGINE_NODES={self.engine_nodes}: stages go across "
                "machines, tensor parallelism stays inside one"
            )
        addresses = {name: given[name] for name in ("ray_head_address", "ray_node_address") if given[name]}
        problems += [
            f"{name.upper()}={address} is no IPv4 address of a private network, and Ray runs whatever reaches it"
            for name, address in addresses.items()
            if not is_private(address)
        ]
        if self.ray_token is not None and len(self.ray_token.get_secret_value()) < 32:
            problems.append("RAY_TOKEN must have 32 characters or more (openssl rand -hex 32)")
        return problems

    def hidden(self) -> dict[str, Any]:
        """The effective configuration, variable by variable, with secrets hidden."""
        shown: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            shown[name.upper()] = "********" if isinstance(value, SecretStr) else _plain(value)
        return shown


def is_private(address: str) -> bool:
    """Whether `address` is an IPv4 address that the internet does not route."""
    try:
        return not IPv4Address(address).is_global
    except ValueError:
        return False


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def vllm_names() -> frozenset[str]:
    """The `VLLM_*` names that vLLM itself reads, recorded from the pinned version."""
    return _recorded("vllm_environment.txt")


def vllm_quantizations() -> frozenset[str]:
    """The quantization methods that the pinned vLLM knows."""
    return _recorded("vllm_quantizations.txt")


def _recorded(name: str) -> frozenset[str]:
    text = (files("engine") / name).read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the environment. Raises `ConfigurationError` with every problem found."""
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    values: dict[str, str] = {}
    for name in Settings.model_fields:
        if value := environ.get(name.upper(), "").strip():
            values[name] = value
    for name in SECRETS:
        variable = f"{name.upper()}_FILE"
        if path := environ.get(variable, "").strip():
            if name in values:
                problems.append(f"{variable}: {name.upper()} is set too; keep one of them")
                continue
            try:
                if secret := Path(path).read_text(encoding="utf-8").strip():
                    values[name] = secret
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "is not UTF-8 text"
                problems.append(f"{variable}: cannot read {path}: {reason}")
    problems += _unknown(environ)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_input=False, include_url=False):
            where = str(item["loc"][0]).upper() if item["loc"] else ""
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{where}: {message}" if where else message)
        raise ConfigurationError(problems) from None
    if problems:
        raise ConfigurationError(problems)
    return settings


def _unknown(environ: Mapping[str, str]) -> list[str]:
    ours = {name.upper() for name in Settings.model_fields} | {f"{name.upper()}_FILE" for name in SECRETS}
    # Names that other programs of the appliance read from the same environment.
    others = {"VLLM_URL", "VLLM_IMAGE", "ENGINE_CONCURRENCY", "ENGINE_PARTS", "ENGINE_MEMORY", "ENGINE_SHM"}
    others |= {"ENGINE_PYTHON_IMAGE", "ENGINE_SUBNET"}
    known = ours | vllm_names()
    problems = []
    for variable in sorted(environ):
        if variable.startswith(("ENGINE_", "VLLM_")) and variable not in known | others:
            near = difflib.get_close_matches(variable, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{variable}: no such setting{hint}")
    return problems
