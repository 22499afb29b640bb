"""Frames between server and engine process: four bytes of length, then one msgpack message. Never pickle."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec

from engine.messages import ToEngine, ToServer

_LENGTH = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_server = msgspec.msgpack.Decoder(ToServer)


def frame(message: ToEngine | ToServer) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def receive(connection: socket.socket) -> ToEngine | None:
    """The engine's side, blocking: the next message, None when the server has gone."""
    header = _read(connection, _LENGTH.size)
    if header is None:
        return None
    body = _read(connection, _LENGTH.unpack(header)[0])
    return None if body is None else _to_engine.decode(body)


def _read(connection: socket.socket, size: int) -> bytes | None:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = connection.recv(size - len(chunks))
        if not chunk:
            return None
        chunks += chunk
    return bytes(chunks)


async def receive_async(reader: asyncio.StreamReader) -> ToServer | None:
    """The server's side: the next message, None when the engine has gone."""
    try:
        header = await reader.readexactly(_LENGTH.size)
        message: ToServer = _to_server.decode(await reader.readexactly(_LENGTH.unpack(header)[0]))
        return message
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
