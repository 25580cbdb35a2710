"""The handshake: both ends prove that they know the token, and say what to install where they do not fit."""

import pytest

from millpond.pool import handshake, wire
from millpond.pool.errors import AuthenticationError, HandshakeError, VersionMismatch

TORCH = "2.13.0+cpu"


def test_two_ends_with_the_same_token_agree():
    opening = handshake.challenge()
    hello = handshake.answer(opening, "token", "2.11.0")
    welcome = handshake.admit(opening, hello, "token", TORCH, device="CPU", memory_bytes=5)
    assert handshake.confirm(opening, hello, welcome, "token") == wire.Welcome(TORCH, welcome.proof, "CPU", 5)


def test_the_token_is_not_in_what_crosses_the_wire():
    opening = handshake.challenge()
    hello = handshake.answer(opening, "a secret token", TORCH)
    welcome = handshake.admit(opening, hello, "a secret token", TORCH)
    for message in (opening, hello, welcome):
        assert b"secret" not in wire.encode(message)


def test_a_caller_without_the_token_is_refused():
    opening = handshake.challenge()
    with pytest.raises(AuthenticationError, match="MILLPOND_POOL_TOKEN"):
        handshake.admit(opening, handshake.answer(opening, "guess", TORCH), "token", TORCH)


def test_a_listener_without_the_token_is_not_trusted():
    opening = handshake.challenge()
    hello = handshake.answer(opening, "token", TORCH)
    for proof in (b"p" * 32, hello.proof):  # made up, or our own sent back
        with pytest.raises(AuthenticationError, match="not the pool"):
            handshake.confirm(opening, hello, wire.Welcome(TORCH, proof), "token")


def test_another_protocol_is_told_to_install_the_same_version():
    opening = wire.Challenge(wire.PROTOCOL + 1, b"n" * 32)
    with pytest.raises(VersionMismatch, match="Install the same version of millpond at both ends"):
        handshake.answer(opening, "token", TORCH)


@pytest.mark.parametrize(
    ("theirs", "ours", "install"),
    [
        ("2.10.1", TORCH, "pip install 'torch>=2.11'"),
        ("", TORCH, "pip install 'torch>=2.11'"),
        ("gibberish", TORCH, "pip install 'torch>=2.11'"),
        ("3.0.0", TORCH, r"pip install 'torch==2.\*'"),
    ],
)
def test_a_torch_that_does_not_fit_is_told_what_to_install(theirs, ours, install):
    opening = handshake.challenge()
    hello = handshake.answer(opening, "token", theirs)
    with pytest.raises(VersionMismatch, match=install) as mismatch:
        handshake.admit(opening, hello, "token", ours)
    with pytest.raises(VersionMismatch, match=install):
        handshake.confirm(opening, hello, handshake.refusal(mismatch.value, ours), "token")


def test_what_is_no_pool_is_said_to_be_none():
    opening = handshake.challenge()
    hello = handshake.answer(opening, "token", TORCH)
    with pytest.raises(HandshakeError, match="is the address right"):
        handshake.confirm(opening, hello, opening, "token")
