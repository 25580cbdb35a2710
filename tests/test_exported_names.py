"""The public names of each package: adding one is a decision, and so is taking one away."""

import importlib
import pkgutil

import pytest

import millpond

PUBLIC = {
    "millpond.cli": {"main"},
    "millpond.edge": {"serve_edge"},
    "millpond.hub": {"create_app", "serve"},
    "millpond.registry": {
        "ArtifactInvalid",
        "DataSource",
        "Descriptor",
        "Lineage",
        "Manifest",
        "ModelConfig",
        "ModelNotFound",
        "Promotion",
        "PromotionFacts",
        "PushedModel",
        "RegistryError",
        "SignatureRefused",
        "Store",
        "decide",
        "generate_key_pair",
        "parse_config",
        "parse_manifest",
        "sign",
        "split_reference",
        "verify",
        "write_blob",
    },
    "millpond.web": {
        "Access",
        "ApiError",
        "add_openapi",
        "create_app",
        "documented",
        "json_response",
        "read_json",
        "serve",
    },
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_pinned(package):
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_package_that_exports_is_pinned_here():
    packages = [name for _, name, is_package in pkgutil.iter_modules(millpond.__path__, "millpond.") if is_package]
    exporting = {name for name in packages if hasattr(importlib.import_module(name), "__all__")}
    assert exporting == set(PUBLIC)


def test_every_error_for_people_has_a_docstring_that_is_a_sentence():
    waiting, seen = [millpond.MillpondError], []
    while waiting:
        error = waiting.pop()
        seen.append(error)
        waiting += [known for known in error.__subclasses__() if known.__module__.startswith("millpond")]
    assert len(seen) > 3
    assert not [error for error in seen if not (error.__doc__ or "").strip().endswith((".", ")"))]
