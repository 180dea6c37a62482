"""docs/serving/deploy: texts to start from. None is run here; each is read by what reads it, as far as that is there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from longtake.commands.main import COMMANDS, parsed, split
from longtake.paths import REPOSITORY
from longtake.runtime.serve.auth import Door

FOLDER = REPOSITORY / "docs" / "serving" / "deploy"
LONGTAKE = "/opt/venv/bin/longtake"
KNOWN = {
    "FROM",
    "ARG",
    "RUN",
    "COPY",
    "USER",
    "ENV",
    "VOLUME",
    "EXPOSE",
    "STOPSIGNAL",
    "ENTRYPOINT",
    "CMD",
    "WORKDIR",
}


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile: by stage, its instructions and what is said after each."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        assert name in KNOWN, line
        if name == "FROM":
            image, stage = rest.split(" AS ")
            assert ":" in image, "an image has a version"
            found[stage] = []
        else:
            found[stage].append((name, rest))
    return found


def said(stage: str, instruction: str) -> list[str]:
    return [rest for name, rest in stages()[stage] if name == instruction]


def extras() -> dict[str, list[str]]:
    settings: Any = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = settings["project"]["optional-dependencies"]
    return found


def parses(words: list[str]) -> None:
    name, rest = split(words)
    assert name in COMMANDS and isinstance(parsed(name, rest), list)


def test_the_dockerfile_has_a_target_for_each() -> None:
    assert set(stages()) == {"wheel", "cpu", "gpu"}
    for target in ("cpu", "gpu"):
        assert said(target, "USER") == ["longtake"]  # not root
        assert said(target, "STOPSIGNAL") == ["SIGTERM"] and said(target, "EXPOSE") == ["8000"]
        places = json.loads(said(target, "VOLUME")[0])
        assert all(f"chown longtake {' '.join(places)}" in line for line in said(target, "RUN") if "useradd" in line)
        assert (
            said(target, "ENV") == [f"LONGTAKE_HOME=/models PATH={Path(LONGTAKE).parent}:$PATH"] and "/models" in places
        )


def test_what_is_copied_is_there() -> None:
    for stage, lines in stages().items():
        for rest in (rest for name, rest in lines if name == "COPY"):
            words = rest.split()
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in stages(), f"{stage}: {rest}"
                continue
            assert len(words) > 1 and all((REPOSITORY / word).exists() for word in words[:-1]), f"{stage}: {rest}"


def test_the_wheel_finds_all_that_it_is_made_of() -> None:
    """The package is links to the stage folders; what pyproject.toml names is there as well."""
    copied = {word.rstrip("/") for rest in said("wheel", "COPY") for word in rest.split()[:-1]}
    links = {path.resolve().name for path in (REPOSITORY / "longtake").iterdir() if path.is_symlink()}
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert copied == {"longtake", *links, "pyproject.toml", settings["readme"], *settings["license-files"]}


def test_versions_and_extras_are_ours() -> None:
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    installed = [line for stage in stages() for line in said(stage, "RUN") if "pip install" in line]
    versions = [word for line in installed for word in line.split() if "==" in word]
    assert versions and all(word in pinned for word in versions)
    named = {
        name for line in installed for group in re.findall(r"\.whl\)\[([^\]]+)\]", line) for name in group.split(",")
    }
    (default,) = (rest.removeprefix("TENSORRT=") for rest in said("gpu", "ARG"))
    assert {name for name in named if not name.startswith("$")} | {default, "rtx-hopper"} <= set(extras())
    assert "serve" in named and "$TENSORRT" in named


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_image_s_command_parses(target: str) -> None:
    assert json.loads(said(target, "ENTRYPOINT")[0]) == [LONGTAKE]
    command = json.loads(said(target, "CMD")[0])
    assert command[0] == "serve" and ("reference" in command) == (target == "cpu")
    parses(command)


def test_compose_names_targets_secrets_and_volumes_that_are_there() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    assert set(compose["services"]) == {"cpu", "gpu"}
    for name, service in compose["services"].items():
        build = service["build"]
        context = (FOLDER / build["context"]).resolve()
        assert context == REPOSITORY and (context / build["dockerfile"]) == FOLDER / "Dockerfile"
        assert build["target"] == name in stages() and service["profiles"] == [name]
        assert service["ports"] == ["127.0.0.1:8000:8000"]  # TLS stands in front
        assert set(service["secrets"]) <= set(compose["secrets"])
        volumes = dict(volume.split(":") for volume in service["volumes"])
        assert set(volumes) <= set(compose["volumes"])
        assert set(volumes.values()) == set(json.loads(said(name, "VOLUME")[0]))
        assert int(service["stop_grace_period"].removesuffix("s")) > 15
        compile(service["healthcheck"]["test"][3], "healthcheck", "exec")
        parses(service["command"])
        own = json.loads(said(name, "CMD")[0])
        assert service["command"][: len(own)] == own  # the image's, and who may come through the proxy
    assert "devices" in str(compose["services"]["gpu"]) and "devices" not in str(compose["services"]["cpu"])


def test_the_systemd_unit() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(FOLDER / "longtake.service")
    parses(shlex.split(unit["Service"]["ExecStart"])[1:])
    assert int(unit["Service"]["TimeoutStopSec"]) > 15


def test_the_cluster() -> None:
    kube = yaml.safe_load((FOLDER / "kuberay.yaml").read_text(encoding="utf-8"))
    groups = [kube["spec"]["headGroupSpec"], *kube["spec"]["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]
    assert kube["spec"]["authOptions"] == {"mode": "token"}
    for group in groups:  # every claim and secret that is mounted is there, in the head and in each worker
        named = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {each["name"] for each in group["template"]["spec"]["containers"][0]["volumeMounts"]} == named
    # KubeRay's own order is the container's command, then `ray start` once that has ended: serving would never see a cluster
    assert kube["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    assert all(one["command"] == ["/bin/bash", "-c"] for one in containers)
    (head,), (worker,) = (one["args"] for one in containers)
    lines = head.strip().splitlines()
    assert lines[1] == "$KUBERAY_GEN_RAY_START_CMD &" and worker.endswith("exec $KUBERAY_GEN_RAY_START_CMD")
    words = shlex.split(lines[-1])
    assert words[:2] == ["exec", Path(LONGTAKE).name]  # on the image's PATH; signals reach it
    parses(words[2:])
    mounted = [each["mountPath"] for each in containers[0]["volumeMounts"]]
    assert all(any(words[words.index(one) + 1].startswith(at) for at in mounted) for one in ("--store", "--token-file"))
    text = (FOLDER / "kuberay.yaml").read_text(encoding="utf-8")
    target, names = re.findall(r"--target (\w+) --build-arg TENSORRT=(\S+)", text)[0]
    (image,) = {one["image"] for one in containers}
    assert "$TENSORRT]" in str(said(target, "RUN")) and f"-t {image} " in text
    assert "scale" in names.split(",") and set(names.split(",")) <= set(extras())


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_what_stands_in_front(name: str) -> None:
    """The server answers to the name that the proxy passes on: otherwise every request were refused."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    (host,) = set(re.findall(r"server_name (\S+);", text) or re.findall(r"^(\S+) \{$", text, re.M))
    for behind in ("longtake.service", "compose.yaml", "kuberay.yaml"):
        words = re.sub(r"[][,\"]", " ", (FOLDER / behind).read_text(encoding="utf-8")).split()
        origins = tuple(word for before, word in zip(words, words[1:]) if before == "--allow-origin" and "://" in word)
        assert not Door(b"").knows_host(host) and Door(b"", origins=origins).knows_host(host), behind
    assert text.count("{") == text.count("}") > 1 and "127.0.0.1:8000" in text


def test_the_page_tells_of_each_and_that_none_was_run() -> None:
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if "serving/deploy/" in line]
    assert {name for row in rows for name in re.findall(r"serving/deploy/([\w.]+)", row)} == {
        Path(path).name for path in FOLDER.iterdir()
    }
    assert all(row.rstrip().endswith("| not run |") for row in rows)
