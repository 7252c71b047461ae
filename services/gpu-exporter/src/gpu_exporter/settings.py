"""Configuration from the environment, read once. Every problem is reported at once, with the variable's name."""

from __future__ import annotations

import difflib
import re
import socket
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gpu_exporter.demo import MODELS, DemoPlan, parse_plan

# Names that begin like ours and belong to others: the engine shares the appliance's environment.
FOREIGN = frozenset({"GPU_MEMORY_UTILIZATION"})


class BadConfiguration(Exception):
    """What is wrong, one line a problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Settings(BaseSettings):
    """One field a variable, of the same name."""

    model_config = SettingsConfigDict(allow_inf_nan=False, frozen=True, extra="ignore")

    gpu_exporter_host: str = Field("127.0.0.1", description="Address to listen on.")
    gpu_exporter_port: int = Field(9101, ge=0, le=65535, description="Port; 0 takes any free one.")
    gpu_sample_seconds: float = Field(5.0, ge=0.1, le=3600, description="Seconds from one sample to the next.")
    gpu_deadline_seconds: float = Field(
        5.0,
        ge=0.1,
        le=600,
        description="Longest a sample may take; then data disappears and the probe process is replaced.",
    )
    gpu_open_seconds: float = Field(
        60.0,
        ge=0.1,
        le=600,
        description="Longest the driver may take to open (seconds a GPU without persistence mode).",
    )
    gpu_retry_seconds: float = Field(
        10.0, ge=0.1, le=3600, description="Pause before trying again when a sample failed."
    )
    gpu_discover_seconds: float = Field(60.0, ge=0, le=86400, description="How often to look for new GPUs; 0 is never.")
    gpu_expected: int = Field(
        0,
        ge=0,
        le=64,
        description="GPUs that must be there; 0 expects those seen since the start.",
    )
    gpu_processes: bool = Field(False, description="Memory of processes by container (needs the host's process ids).")
    gpu_pcie_throughput: bool = Field(
        False,
        description="Add PCIe throughput as NVML measures it, which blocks 20 ms a GPU and direction.",
    )
    gpu_exit_on_access_lost: bool = Field(
        False,
        description="Exit with status 3 when this container lost its GPU devices, so that a restart brings them back.",
    )
    gpu_hostname: str = Field(default_factory=socket.gethostname, description="Label `Hostname` of DCGM's names.")
    metric_names: Literal["native", "dcgm", "both"] = Field("native", description="Whose metric names to use.")
    demo: str = Field("", description="Simulate GPUs instead of reading any, for example `2xH100`.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe log line to write."
    )

    @field_validator("demo")
    @classmethod
    def _known_demo(cls, value: str) -> str:
        if value and parse_plan(value) is None:
            raise ValueError(f"write it as COUNTxMODEL, COUNT 1 to 16, MODEL one of {', '.join(MODELS)}")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @property
    def demo_plan(self) -> DemoPlan | None:
        """What to simulate, or None for real GPUs."""
        return parse_plan(self.demo) if self.demo else None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` passes: it has already read the environment."""
        return (init_settings,)


def load(environment: Mapping[str, str]) -> Settings:
    """The settings in `environment`. An empty value is an unset one. Raises BadConfiguration with every problem."""
    known = [name.upper() for name in Settings.model_fields]
    problems = [_unknown(name, known) for name in sorted(environment) if name.startswith("GPU_")]
    problems = [problem for problem in problems if problem]
    given = {name.lower(): environment[name] for name in known if environment.get(name, "") != ""}
    try:
        settings = Settings(**given)  # type: ignore[arg-type]  # the values are text until validation
    except ValidationError as error:
        problems += [
            f"{'.'.join(map(str, problem['loc'])).upper() or 'settings'}: {_plain(problem['msg'])}"
            for problem in error.errors()
        ]
    if problems:
        raise BadConfiguration(problems)
    return settings


def _unknown(name: str, known: list[str]) -> str:
    if name in known or name in FOREIGN:
        return ""
    near = difflib.get_close_matches(name, known, 1)
    return f"{name}: no such variable" + (f"; did you mean {near[0]}?" if near else "")


def _plain(message: str) -> str:
    return re.sub(r"^Value error, ", "", message)
