"""The device side of adb's transport protocol, over TCP: the daemon that runs on a
phone and answers a computer's adb server.

Protocol: packages/modules/adb/protocol.txt (packets, streams), SYNC.TXT (files) and
shell_protocol.h (``shell,v2``) of the Android sources. ``adb connect 127.0.0.1:PORT``
attaches it like a phone over Wi-Fi.

The phone's paths live under ``root``. Its shell is this machine's /bin/sh; in its
commands, the folders in ``MAPPED`` stand for those under ``root``.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = (
    int.from_bytes(name, "little")
    for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
)
VERSION, MAX_PAYLOAD_BYTES = 0x01000001, 256 * 1024
AUTH_TOKEN, AUTH_SIGNATURE = 1, 2
STDOUT, STDERR, EXIT = 1, 2, 3
FEATURES = "shell_v2,cmd,stat_v2,fixed_push_mkdir"
MAPPED = ("/data/local/tmp", "/sys/devices")


class Adbd:
    """A phone's daemon. ``plug`` makes it reachable at ``port``, ``unplug`` breaks
    every connection, and both can be repeated.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment = root, environment
        self.authorized = True
        self.on_received: Callable[[int], None] = lambda count_bytes: None
        self.free_bytes = 10**12
        self.port = 0
        self._listener: socket.socket | None = None
        self._connections: list[_Connection] = []

    @property
    def serial(self) -> str:
        """The serial number that adb gives a device at this address."""
        return f"127.0.0.1:{self.port}"

    def plug(self) -> None:
        """Listen, on the same port each time."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                connection = _Connection(self, listener.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()

    def unplug(self) -> None:
        """Close the listener and every connection, whatever they are doing."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        while self._connections:
            self._connections.pop().close()

    def local(self, path: str) -> Path:
        """The path on this machine that stands for a path on the phone."""
        return self.root / path.lstrip("/")

    def shell(self, command: str) -> subprocess.Popen[bytes]:
        """Start a command in its own session."""
        for folder in MAPPED:
            command = command.replace(folder, str(self.local(folder)))
        return subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.root,
            env=self.environment, start_new_session=True,
        )  # fmt: skip


class _Connection:
    """One computer's connection: packets in, streams out."""

    def __init__(self, adbd: Adbd, wire: socket.socket) -> None:
        self.adbd, self.wire = adbd, wire
        # packets are small, and the sender waits for each of them
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.streams: dict[int, _Stream] = {}
        self._sending = threading.Lock()

    def close(self) -> None:
        with suppress(OSError):
            self.wire.shutdown(socket.SHUT_RDWR)
        self.wire.close()

    def send(self, command: int, arg0: int, arg1: int, payload: bytes = b"") -> None:
        header = struct.pack(
            "<6I",
            command,
            arg0,
            arg1,
            len(payload),
            sum(payload) & 0xFFFFFFFF,
            command ^ 0xFFFFFFFF,
        )
        with self._sending:
            self.wire.sendall(header + payload)

    def serve(self) -> None:
        try:
            with self.wire.makefile("rb") as packets:
                while len(header := packets.read(24)) == 24:
                    command, arg0, arg1, length, _, _ = struct.unpack("<6I", header)
                    self._handle(command, arg0, arg1, packets.read(length))
        except (OSError, ValueError):
            pass  # unplugged
        finally:
            for stream in list(self.streams.values()):
                stream.end()

    def _handle(self, command: int, arg0: int, arg1: int, payload: bytes) -> None:
        if command == CNXN:
            (
                self._welcome()
                if self.adbd.authorized
                else self.send(AUTH, AUTH_TOKEN, 0, os.urandom(20))
            )
        elif command == AUTH and arg0 == AUTH_SIGNATURE:
            # reject the signature; the public key that follows gets no answer, as if
            # the dialog were still open
            self.send(AUTH, AUTH_TOKEN, 0, os.urandom(20))
        elif command == OPEN:
            stream = _Stream(self, arg0)
            self.streams[arg0] = stream
            threading.Thread(
                target=stream.serve, args=(payload.rstrip(b"\0").decode(),), daemon=True
            ).start()
        elif arg0 in self.streams:
            stream = self.streams[arg0]
            if command == WRTE:
                stream.incoming.put(payload)
            elif command == OKAY:
                stream.credit.release()
            elif command == CLSE:
                stream.end()

    def _welcome(self) -> None:
        self.send(
            CNXN,
            VERSION,
            MAX_PAYLOAD_BYTES,
            f"device::ro.product.model=Fake Phone;features={FEATURES}".encode(),
        )


class _Stream:
    """One stream of a connection, between a service and its client. Each write waits
    until the other side has acknowledged the one before.
    """

    def __init__(self, connection: _Connection, remote: int) -> None:
        # each side chooses its own ids, so ours may equal theirs
        self.connection, self.adbd, self.id = connection, connection.adbd, remote
        self.incoming: queue.Queue[bytes | None] = queue.Queue()
        self.credit = threading.Semaphore(1)
        self.ended = False
        self._buffer = b""

    def end(self) -> None:
        self.ended = True
        self.connection.streams.pop(self.id, None)
        self.incoming.put(None)
        self.credit.release()

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_PAYLOAD_BYTES):
            self.credit.acquire()
            if self.ended:
                raise EOFError
            self.connection.send(WRTE, self.id, self.id, data[start : start + MAX_PAYLOAD_BYTES])

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        while len(self._buffer) < count:
            data = self.incoming.get()
            if data is None:
                raise EOFError
            self.connection.send(OKAY, self.id, self.id)
            self._buffer += data
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def serve(self, service: str) -> None:
        name, _, argument = service.partition(":")
        with suppress(EOFError, OSError):
            if name.split(",")[0] not in ("shell", "exec", "sync"):
                self.connection.send(CLSE, 0, self.id)
                return
            self.connection.send(OKAY, self.id, self.id)
            if name == "sync":
                _Sync(self).serve()
            else:
                _shell(self, argument, v2="v2" in name.split(","))
            self.connection.send(CLSE, self.id, self.id)
        self.end()


def _shell(stream: _Stream, command: str, *, v2: bool) -> None:
    """Run a command and forward its output. If the client disconnects first, hang up
    the command's session.
    """
    process = stream.adbd.shell(command)

    def watch() -> None:
        with suppress(EOFError):
            while True:
                stream.read(1)  # discard the client's input
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGHUP)

    def forward(pipe: int, kind: int) -> None:
        with suppress(EOFError, OSError):
            while data := os.read(pipe, 4096):
                stream.write(struct.pack("<BI", kind, len(data)) + data if v2 else data)

    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None and process.stderr is not None
    with process:
        forwards = [
            threading.Thread(target=forward, args=(pipe.fileno(), kind), daemon=True)
            for pipe, kind in ((process.stdout, STDOUT), (process.stderr, STDERR))
        ]
        for thread in forwards:
            thread.start()
        for thread in forwards:
            thread.join()
    if v2:
        stream.write(struct.pack("<BIB", EXIT, 1, process.returncode & 0xFF))


class _Sync:
    """adb's file service, ``sync:``."""

    def __init__(self, stream: _Stream) -> None:
        self.stream, self.adbd = stream, stream.adbd

    def serve(self) -> None:
        while True:
            kind, length = struct.unpack("<4sI", self.stream.read(8))
            if kind == b"QUIT":
                return
            path = self.stream.read(length).decode()
            {
                b"STAT": self._stat,
                b"STA2": self._stat_v2,
                b"LST2": self._stat_v2,
                b"SEND": self._receive,
                b"RECV": self._send,
            }[kind](path)

    def _stat(self, path: str) -> None:
        file = self.adbd.local(path)
        status = file.lstat() if file.exists() else None
        fields = (status.st_mode, status.st_size, int(status.st_mtime)) if status else (0, 0, 0)
        self.stream.write(struct.pack("<4s3I", b"STAT", *fields))

    def _stat_v2(self, path: str) -> None:
        file, no_such_file = self.adbd.local(path), 2
        fields = (no_such_file, *(0,) * 11)
        if file.exists():
            status = file.stat()
            times = (int(status.st_atime), int(status.st_mtime), int(status.st_ctime))
            fields = (
                0,
                status.st_dev,
                status.st_ino,
                status.st_mode,
                status.st_nlink,
                status.st_uid,
                status.st_gid,
                status.st_size,
                *times,
            )
        self.stream.write(struct.pack("<4sIQQIIIIQqqq", b"STA2", *fields[:11]))

    def _receive(self, path_and_mode: str) -> None:
        path, _, mode = path_and_mode.rpartition(",")
        file, failure = self.adbd.local(path), ""
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as opened:
            while (part := struct.unpack("<4sI", self.stream.read(8)))[0] == b"DATA":
                data = self.stream.read(part[1])
                self.adbd.free_bytes -= len(data)
                if self.adbd.free_bytes < 0:
                    failure = "No space left on device"
                else:
                    opened.write(data)
                self.adbd.on_received(len(data))
        if failure:
            file.unlink()
            self.stream.write(struct.pack("<4sI", b"FAIL", len(failure)) + failure.encode())
            return
        file.chmod(stat.S_IMODE(int(mode)))
        self.stream.write(struct.pack("<4sI", b"OKAY", 0))

    def _send(self, path: str) -> None:
        file = self.adbd.local(path)
        if not file.is_file():
            failure = b"open failed: No such file or directory"
            self.stream.write(struct.pack("<4sI", b"FAIL", len(failure)) + failure)
            return
        data = file.read_bytes()
        for start in range(0, len(data), 65536):
            part = data[start : start + 65536]
            self.stream.write(struct.pack("<4sI", b"DATA", len(part)) + part)
        self.stream.write(struct.pack("<4sI", b"DONE", 0))
