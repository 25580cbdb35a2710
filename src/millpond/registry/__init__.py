"""Models: immutable, versioned, signed. Where they lie, what they consist of, when one replaces another."""

from millpond.registry.errors import ArtifactInvalid, ModelNotFound, RegistryError, SignatureRefused
from millpond.registry.manifest import (
    DataSource,
    Descriptor,
    Lineage,
    Manifest,
    ModelConfig,
    parse_config,
    parse_manifest,
)
from millpond.registry.promote import Promotion, PromotionFacts, decide
from millpond.registry.signing import generate_key_pair, sign, verify
from millpond.registry.store import PushedModel, Store, split_reference, write_blob

__all__ = [
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
]
