"""What goes wrong with models: `RegistryError` ← `ModelNotFound`, `ArtifactInvalid`, `SignatureRefused`."""

from __future__ import annotations

from millpond import MillpondError


class RegistryError(MillpondError):
    """The registry cannot do what was asked."""


class ModelNotFound(RegistryError):
    """No such model, tag or digest here."""


class ArtifactInvalid(RegistryError):
    """A model directory, manifest or blob is not what it must be: it is damaged, or was never a model of ours."""


class SignatureRefused(RegistryError):
    """A model's signature does not show that the holder of our key signed exactly these files.

    `reason` says what was found, without the advice that the whole message ends with.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"signature refused: {reason} Do not use this model; get it again from the site that signed it."
        )
        self.reason = reason
