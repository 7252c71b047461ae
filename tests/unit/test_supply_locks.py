"""Lock files, Dockerfiles and ranges of versions, read for the bill of materials and the audit."""

import re

import pytest
from scripts.supply import bom
from scripts.supply.advisories import affects
from scripts.supply.locks import (
    DOCKERFILES,
    REPOSITORY,
    LockError,
    built_on,
    contents,
    dockerfile,
    lock_files,
    packages,
    pulled,
    unlocked,
)


def test_every_dockerfile_of_ours_has_a_bill_of_materials():
    here = {str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("services/*/Dockerfile*")}
    assert here == set(DOCKERFILES.values())
    for image in DOCKERFILES:
        assert ":" in built_on(image)


def test_every_pulled_image_is_listed():
    compose = (REPOSITORY / "compose.yaml").read_text()
    assert len(pulled()) == compose.partition("\n\n# What holds")[0].count("_IMAGE:-") > 8
    named = {one["name"] for one in bom.appliance_document()["components"]}
    assert {"grafana/grafana", "nginx", "vllm/vllm-openai", "gateway", "engine-cpu"} <= named


def test_images_install_by_hash_alone():
    """A name given to pip in a Dockerfile would be whatever its index serves that day."""
    for image in DOCKERFILES:
        calls = re.findall(r"\bpip\b[^&|\n]*? install ([^&|;\n]*)", dockerfile(image).replace("\\\n", " "))
        assert calls, image
        for call in calls:
            plain = re.sub(r"(--target|-r|--requirement) +\S+", "", call)
            named = {word for word in plain.split() if not word.startswith(("-", "services/"))}
            assert not named, f"{image}: {named}"
            assert "--require-hashes" in call or "--no-deps" in call, f"{image}: {call}"
    assert [one.name for one in unlocked("engine-cpu")] == ["torch"]


def test_every_lock_file_that_a_dockerfile_names_is_found():
    for image in DOCKERFILES:
        named = set(re.findall(r"requirements/[\w.-]+\.txt", dockerfile(image)))
        assert {str(lock.relative_to(REPOSITORY)) for lock in lock_files(image)} == named
        assert all(lock.exists() for lock in lock_files(image))


def test_an_optional_package_is_marked_and_one_that_is_there_anyway_is_not():
    optional = {one.name for one in contents("engine") if one.optional == "WITH_RAY"}
    always = {one.name for one in packages(REPOSITORY / "requirements" / "vllm.txt")}
    assert "ray" in optional
    assert not optional & {one.name for one in contents("engine") if not one.optional and one.name in always}


@pytest.mark.parametrize("line", ["aiohttp>=3", "aiohttp==3 # no hash", "-e .", "aiohttp==3.1\n    --hash=md5:00"])
def test_what_is_not_locked_is_refused(tmp_path, line):
    lock = tmp_path / "lock.txt"
    lock.write_text(line + "\n")
    with pytest.raises(LockError):
        packages(lock)


def test_markers_and_hashes_are_read(tmp_path):
    lock = tmp_path / "lock.txt"
    one, two = "a" * 64, "b" * 64
    lock.write_text(
        f"Some.Name==1.2 ; sys_platform == 'win32' \\\n    --hash=sha256:{one} \\\n    --hash=sha256:{two}\n"
    )
    (package,) = packages(lock)
    assert (package.name, package.version, package.marker) == ("some-name", "1.2", "sys_platform == 'win32'")
    assert package.hashes == (one, two)


@pytest.mark.parametrize(
    ("events", "hit", "free"),
    [
        ([{"introduced": "0"}, {"fixed": "2.0"}], ["1.0", "2.0rc1", "0.1"], ["2.0", "3"]),
        ([{"introduced": "1.1"}, {"last_affected": "1.4"}], ["1.1", "1.4"], ["1.0", "1.4.1"]),
        (
            [{"introduced": "3.0"}, {"fixed": "3.2"}, {"introduced": "0"}, {"fixed": "2.5"}],
            ["2.4", "3.1"],
            ["2.5", "3.2"],
        ),
        ([{"introduced": "1"}], ["1", "99"], ["0.9"]),
        ([{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.0"}, {"fixed": "1.1"}], ["0.9", "1.0"], ["1.1"]),
    ],
)
def test_ranges(events, hit, free):
    affected = {"ranges": [{"type": "ECOSYSTEM", "events": events}]}
    assert [version for version in hit + free if affects(affected, version)] == hit


def test_debian_packages_are_those_that_are_installed():
    status = (
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.41-12+deb13u1\n"
        "Description: C\n long: text\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1:1.0\n"
    )
    (only,) = bom.debian_components(status)
    assert only["purl"] == "pkg:deb/debian/libc6@2.41-12%2Bdeb13u1?arch=amd64"
