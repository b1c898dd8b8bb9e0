"""How workers meet before TensorFlow connects them.

TensorFlow waits for ever for a worker that never comes, and does not compare what the workers
were started with. So they first meet by themselves, over plain TCP on the very ports of the
cluster: each sends the chief one line of JSON, and the chief answers all with the same line:
go on, or the sentence with which every worker ends. Then the ports are free for TensorFlow.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lth_tf.distribute.cluster import Cluster
from lth_tf.errors import UserError

LONGEST = 1 << 20  # bytes of a line; whoever sends more is no worker


def meet(
    cluster: Cluster, statement: Mapping[str, Any], timeout: float, problem: str | None = None
) -> None:
    """Waits until all workers are there, and makes sure that they want the same.

    All call it, before TensorFlow connects them. It ends well everywhere, or, within about the
    timeout, with a sentence, the same for all whom the chief hears. Afterwards the cluster's
    ports are free. Whoever claims an index when all are taken already fails alone.

    Args:
      cluster: the workers and which of them this is.
      statement: name -> JSON-ready value; what must be equal on all.
      timeout: seconds from the chief's start, or this worker's, until all must have come.
      problem: a sentence on what keeps this worker from taking part.

    Raises:
      UserError: a worker is missing, has a problem, claims an index that another one has, was
        given another list of workers or states something else; the chief cannot be reached; or
        this worker's port is in use.
    """
    own = cluster.workers[cluster.index]
    listener, stop, host = None, threading.Event(), None
    try:
        listener = _listen(own)
        if cluster.chief:
            host = threading.Thread(target=_host, args=(listener, cluster, timeout, stop))
            host.daemon = True  # Ctrl-C ends the process without waiting for it
            host.start()
    except OSError as error:
        in_use = (
            f"cannot listen at {own} ({os.strerror(error.errno or 0)}): end what uses the port, "
            "an earlier run or a second start (ss -ltnp shows it), or give the worker another one"
        )
        # The others wait for this one, so they are told; a chief has nobody else to tell.
        problem, timeout = problem or in_use, min(timeout, 3) if cluster.chief else timeout
    try:
        claim = {
            "lth_tf": "claim", "index": cluster.index, "workers": cluster.workers,
            "statement": dict(statement), "problem": problem,
        }  # fmt: skip
        sentence = _ask(cluster, claim, timeout)
        stop.set()
        if host:
            host.join()
    finally:
        stop.set()
        if listener:
            listener.close()
    if sentence:
        raise UserError(sentence)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(address: str) -> socket.socket:
    """A socket that listens at an address's port on all interfaces; raises OSError."""
    port = _split(address)[1]
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _ask(cluster: Cluster, claim: Mapping[str, Any], timeout: float) -> str | None:
    """Gives the chief a claim; returns its answer, or why there is none."""
    address, deadline = cluster.workers[0], time.monotonic() + timeout
    line = json.dumps(claim).encode() + b"\n"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(_split(address), min(left, 5)) as connection:
                connection.sendall(line)
                reason = "what answers there is no chief that waits for workers"
                # The chief may have started later than this worker, and waits as long.
                answer = _read(_line(connection, time.monotonic() + timeout + 5), "answer")
                if answer and isinstance(answer.get("sentence", 0), str | None):
                    return answer["sentence"]
        except (OSError, UnicodeError) as error:  # the latter: of a name that cannot be one
            reason = getattr(error, "strerror", None) or str(error)
        time.sleep(0.2)
    if claim["problem"]:
        return f"worker {cluster.index}: {claim['problem']}"
    return (
        f"worker {cluster.index} cannot reach the chief at {address} within {timeout:g} s "
        f"({reason}): start the same command there, and see that the machines let each other "
        "through to the cluster's ports; --worker_timeout gives more time"
    )


def _line(connection: socket.socket, deadline: float) -> bytes:
    """The line that comes until the deadline, or what there is of it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < LONGEST:
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        piece = connection.recv(1 << 16)
        if not piece:
            break
        line += piece
    return line


def _read(line: bytes, kind: str) -> dict[str, Any] | None:
    """The object of a line that a process of lth_tf sent, or None where it is anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("lth_tf") == kind else None


def _host(listener: socket.socket, cluster: Cluster, timeout: float, stop: threading.Event) -> None:
    """The chief's part: collects the workers' claims and answers them all alike.

    An answer that ends the run goes to who is there, and to each that comes later.

    Args:
      listener: the chief's socket.
      cluster: the workers.
      timeout: seconds until all must have come.
      stop: set when this process has its own answer, perhaps from another one's chief.
    """
    deadline, late, untold = time.monotonic() + timeout, False, len(cluster.workers)
    answer: dict[str, Any] | None = None
    claims: dict[socket.socket, dict[str, Any]] = {}
    with selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        while not late and (not stop.is_set() or (answer and answer["sentence"] and untold > 0)):
            for connection, claim in _heard(selector, listener):
                claims.pop(connection, None)
                if claim:
                    claims[connection] = claim
            late = time.monotonic() > deadline
            if answer is None:
                complaint = _complaint(list(claims.values()))
                complete = len(claims) == len(cluster.workers)
                if late and not complete and not complaint:
                    complaint = _missing(cluster, claims.values(), timeout)
                if complaint or complete:
                    answer = {"lth_tf": "answer", "sentence": complaint}
            if answer:
                untold -= sum(_answer(selector, connection, answer) for connection in claims)
                claims.clear()
        for key in [*selector.get_map().values()]:
            if key.fileobj is not listener:
                key.fileobj.close()  # type: ignore[union-attr]


def _heard(
    selector: selectors.BaseSelector, listener: socket.socket
) -> Iterator[tuple[socket.socket, dict[str, Any] | None]]:
    """Accepts and reads what there is; yields who made a claim, and who has gone (None)."""
    for key, _ in selector.select(0.1):
        if key.fileobj is listener:
            with contextlib.suppress(OSError):  # of one that has gone already
                connection, _ = listener.accept()
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ, bytearray())
            continue
        connection, line = key.fileobj, key.data  # type: ignore[assignment]
        try:
            piece = connection.recv(1 << 16)
        except OSError:
            piece = b""
        line += piece
        whole = line.endswith(b"\n")
        claim = _claim(connection, bytes(line)) if piece and whole else None
        if claim:
            yield connection, claim
        elif whole or not piece or len(line) > LONGEST:
            selector.unregister(connection)
            connection.close()
            yield connection, None


def _claim(connection: socket.socket, line: bytes) -> dict[str, Any] | None:
    """A worker's claim, with its sender's address as "peer"; None where it is none."""
    claim = _read(line, "claim")
    kinds = {"index": int, "workers": list, "statement": dict, "problem": str | None}
    if claim is None or not all(isinstance(claim.get(k), kind) for k, kind in kinds.items()):
        return None
    if not 0 <= claim["index"] < len(claim["workers"]):
        return None
    try:
        peer = str(connection.getpeername()[0]).removeprefix("::ffff:")
    except OSError:
        return None
    return {**claim, "workers": tuple(map(str, claim["workers"])), "peer": peer}


def _answer(
    selector: selectors.BaseSelector, connection: socket.socket, answer: dict[str, Any]
) -> bool:
    selector.unregister(connection)
    with connection:
        try:
            connection.settimeout(5)
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:  # has gone; it will see for itself
            return False
    return True


def _complaint(claims: Sequence[Mapping[str, Any]]) -> str | None:
    """Why these workers cannot work together, in one sentence, or None."""
    claims = sorted(claims, key=lambda claim: claim["index"])
    if lists := _difference([(c["index"], ", ".join(c["workers"])) for c in claims]):
        return f"the workers were given different lists of workers: {lists}; give all the same"
    for one, other in zip(claims, claims[1:], strict=False):
        if one["index"] == other["index"]:
            return (
                f"two processes, on {one['peer']} and {other['peer']}, both say that they are "
                f"worker {one['index']}, at {one['workers'][one['index']]}: start each worker "
                "once, and give each its own index"
            )
    for claim in claims:
        if claim["problem"]:
            return f"worker {claim['index']}: {claim['problem']}"
    keys = dict.fromkeys(key for claim in claims for key in claim["statement"])
    differing = []
    for key in keys:
        values = [
            (
                claim["index"],
                json.dumps(claim["statement"][key], sort_keys=True)
                if key in claim["statement"]
                else "missing",
            )
            for claim in claims
        ]
        if found := _difference(values):
            differing.append(f"{key} is {found}")
    if differing:
        return f"{'; '.join(differing)}: start the same command everywhere"
    return None


def _difference(values: Sequence[tuple[int, str]]) -> str | None:
    """'0.1 at worker 0 and 2, 0.01 at worker 1' of (worker, text), or None where all are equal."""
    holders: dict[str, list[str]] = {}
    for worker, text in values:
        holders.setdefault(text, []).append(str(worker))
    if len(holders) < 2:
        return None
    return ", ".join(f"{text} at worker {' and '.join(who)}" for text, who in holders.items())


def _missing(cluster: Cluster, claims: Any, timeout: float) -> str:
    here = {claim["index"] for claim in claims}
    names = [f"{i} at {a}" for i, a in enumerate(cluster.workers) if i not in here]
    return (
        f"worker {' and '.join(names)} did not come within {timeout:g} s: start the same command "
        "there, each with its own index; --worker_timeout gives more time"
    )
