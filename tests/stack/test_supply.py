"""`make sbom` against the images that really run."""

import json
from pathlib import Path

import pytest
from tests.stack.appliance import Appliance
from tests.stack.test_hardening import INSTALLED

BASE = ("pip", "setuptools", "wheel")  # the base image's own


def bill(folder: Path, image: str) -> dict[str, str]:
    """purl without its arguments → version."""
    listed = json.loads((folder / f"{image}.cdx.json").read_text())["components"]
    return {one["purl"].partition("?")[0]: one["version"] for one in listed if "purl" in one}


@pytest.fixture(scope="module")
def bills(appliance: Appliance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sbom")
    told = appliance.run("scripts/sbom", "--to", str(folder))
    for image in ("init", "gateway", "gpu-exporter", "engine-cpu"):
        assert f"/{image}:dev is not built here" not in told, told
    return folder


def test_a_bill_of_materials_lists_the_packages_of_debian(bills: Path) -> None:
    for image in ("init", "gateway", "gpu-exporter", "engine-cpu"):
        listed = bill(bills, image)
        debian = {purl for purl in listed if purl.startswith("pkg:deb/debian/")}
        assert len(debian) > 50, (image, len(debian))
        assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in debian), image


def test_a_bill_of_materials_lists_every_python_package_that_is_installed(appliance: Appliance, bills: Path) -> None:
    for service in ("gateway", "gpu-exporter"):
        listed = bill(bills, service)
        installed = dict(line.split() for line in appliance.exec(service, "python3", "-c", INSTALLED).splitlines())
        missing = {
            name: version
            for name, version in installed.items()
            if name not in BASE and listed.get(f"pkg:pypi/{name}@{version}") != version
        }
        assert not missing, f"{service} holds what its bill does not list: {missing}"
