"""What `kubectl kustomize` makes of a folder of deploy/, as far as those folders use its language.

Knows resources, components, JSON patches that add, images, labels and the namespace; and ConfigMaps
of files. What it does not know is an error. tests/unit/test_deploy.py compares it with kubectl.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
KNOWN = {
    "apiVersion", "kind", "resources", "components", "patches", "images", "labels", "namespace",
    "configMapGenerator", "generatorOptions",
}  # fmt: skip
CLUSTER_WIDE = ("ClusterRole", "ClusterRoleBinding")


def built(folder: Path) -> list[Json]:
    """Return the objects that a kustomization makes."""
    return _built(folder.resolve(), [])


def _built(folder: Path, below: list[Json]) -> list[Json]:
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(told) <= KNOWN, f"{folder}: {set(told) - KNOWN}"
    made = below
    for name in told.get("resources", ()):
        path = (folder / name).resolve()
        made += _built(path, []) if path.is_dir() else [*yaml.safe_load_all(path.read_text())]
    for one in told.get("configMapGenerator", ()):
        _config_map(made, folder, one)
    for name in told.get("components", ()):
        made = _built((folder / name).resolve(), made)
    for patch in told.get("patches", ()):
        target = patch["target"]
        (meant,) = [
            one
            for one in made
            if (one["kind"], one["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        for step in yaml.safe_load(patch["patch"]):
            _add(meant, step)
    for one in made:
        if "namespace" in told and one["kind"] not in CLUSTER_WIDE:
            one["metadata"]["namespace"] = told["namespace"]
        for label in told.get("labels", ()):
            _label(one, label["pairs"])
        for image in told.get("images", ()):
            for container in _containers(one):
                if container["image"].partition(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return made


def _config_map(made: list[Json], folder: Path, told: Json) -> None:
    data = {name: (folder / name).read_text() for name in told["files"]}
    if told.get("behavior") == "replace":
        (old,) = [
            one
            for one in made
            if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", told["name"])
        ]
        old["data"] = data
    else:
        metadata = {"name": told["name"]}
        made.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _add(thing: Json, step: Json) -> None:
    assert step["op"] == "add", step
    *way, last = step["path"].strip("/").split("/")
    place: Any = thing
    for word in way:
        place = place[int(word) if isinstance(place, list) else word]
    value = copy.deepcopy(step["value"])
    if isinstance(place, list):
        assert last == "-", step
        place.append(value)
    else:
        place[last] = value


def _label(thing: Json, pairs: Json) -> None:
    thing["metadata"].setdefault("labels", {}).update(pairs)
    if "template" in thing.get("spec", {}):
        template = thing["spec"]["template"]
        template.setdefault("metadata", {}).setdefault("labels", {}).update(pairs)
        selector = thing["spec"].setdefault("selector", {})
        selector.setdefault("matchLabels", {}).update(pairs)


def _containers(thing: Json) -> list[Json]:
    pod = thing.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("containers", ()), *pod.get("initContainers", ())]
