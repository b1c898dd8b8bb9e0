"""Who the workers are, and how they meet: real sockets, a real process for each worker."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from lth_tf.distribute.cluster import Cluster, resolve
from lth_tf.distribute.launch import free_ports
from lth_tf.distribute.meeting import meet
from lth_tf.errors import UserError


def tf_config(cluster, kind="worker", index=0):
    return {
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}}),
        "SLURM_JOB_ID": "7",  # TF_CONFIG comes first
    }


def test_tf_config():
    workers = {"worker": ["a:1", "b:2"]}
    assert resolve(tf_config(workers, index=1)) == Cluster(("a:1", "b:2"), 1)
    assert resolve(tf_config(workers, index="0")).chief  # some schedulers write text
    both = {"worker": ["b:2", "[::1]:3"], "chief": ["a:1"]}
    assert resolve(tf_config(both, "chief")) == Cluster(("a:1", "b:2", "[::1]:3"), 0)
    assert resolve(tf_config(both, "worker", 1)) == Cluster(("a:1", "b:2", "[::1]:3"), 2)


@pytest.mark.parametrize(
    "config, said",
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object"),
        ('{"task": {"type": "worker", "index": 0}}', 'has no "cluster"'),
        ('{"cluster": {"worker": ["a:1"]}}', 'has no "task"'),
        (({"worker": ["a:1"]}, "worker", 1), "lacks this task.*index 1; it has worker 0 to 0"),
        (({"worker": ["a:1"]}, "worker", -1), "lacks this task"),
        (({"worker": ["a:1"]}, "chief", 0), "lacks this task, type 'chief'"),
        (({"worker": ["a:1"], "ps": ["b:1"]}, "worker", 0), "kind 'ps', but here all workers"),
        (({"worker": ["a:1"], "evaluator": ["b:1"]}, "worker", 0), "kind 'evaluator'"),
        (({"worker": "a:1"}, "worker", 0), "not a list"),
        (({"worker": ["a"]}, "worker", 0), "address 'a'"),
        (({"worker": ["a:0"]}, "worker", 0), "address 'a:0'"),
        (({"worker": ["a:65536"]}, "worker", 0), "address 'a:65536'"),
        (({"worker": ["http://a:1"]}, "worker", 0), "address 'http://a:1'"),
        (({"worker": ["::1:1"]}, "worker", 0), "address '::1:1'"),
        (({"worker": [["a", 1]]}, "worker", 0), "address"),
        (({"worker": ["a:1", "a:1"]}, "worker", 0), "'a:1' twice"),
        (({"worker": ["a:1"], "chief": ["a:1"]}, "worker", 0), "'a:1' twice"),
        (({"worker": ["a:1"], "chief": ["b:1", "c:1"]}, "worker", 0), "2 chiefs"),
        (({"worker": []}, "worker", 0), "names no worker"),
    ],
)
def test_a_wrong_tf_config_is_one_clear_sentence(config, said):
    environ = {"TF_CONFIG": config} if isinstance(config, str) else tf_config(*config)
    with pytest.raises(UserError, match=said):
        resolve(environ)


def test_without_a_cluster_the_error_names_the_ways_to_one():
    for environ in ({}, {"TF_CONFIG": ""}):
        with pytest.raises(UserError, match="TF_CONFIG.*srun.*Indexed Job.*launch_local"):
            resolve(environ)


def slurm(node, local, rank, nodes="n[2,10]", tasks="1(x2)", count="2"):
    return {
        "SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": count,
        "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURMD_NODENAME": node, "SLURM_LOCALID": str(local),
    }  # fmt: skip


def test_slurm_with_one_task_per_node_and_several(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "before")
    # n2 has rank 0, but all must count in the same order, and the resolver's is n10, n2.
    there = ("n10:2222", "n2:2222")
    assert resolve(slurm("n2", 0, rank=0)) == Cluster(there, 1)
    assert resolve(slurm("n10", 0, rank=1)) == Cluster(there, 0)
    many = {"nodes": "gpu-[01-02]", "tasks": "2,1", "count": "3"}
    there = ("gpu-01:4000", "gpu-01:4001", "gpu-02:4000")
    tasks = [("gpu-01", 0, 0), ("gpu-02", 0, 1), ("gpu-01", 1, 2)]  # dealt out in turn
    found = [resolve({**slurm(*task, **many), "LTH_TF_PORT": "4000"}) for task in tasks]
    assert found == [Cluster(there, 0), Cluster(there, 2), Cluster(there, 1)]
    assert os.environ["SLURM_PROCID"] == "before" and "SLURM_STEP_NODELIST" not in os.environ


@pytest.mark.parametrize(
    "environ, said",
    [
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "Slurm job 7.*SLURM_LOCALID not set.*srun"),
        (slurm("n2", 0, 0, nodes="n["), "not understood.*n\\["),
        (slurm("n2", 0, 0, tasks="x"), "not understood"),
        (slurm("n2", 0, 0, count="5"), "not understood.*5"),
        (slurm("m1", 0, 0), "is at m1:2222, but Slurm's step has n10:2222, n2:2222"),
        ({**slurm("n2", 0, 0), "LTH_TF_PORT": "http"}, "LTH_TF_PORT is 'http'"),
    ],
)
def test_a_wrong_slurm_step_is_one_clear_sentence(environ, said):
    with pytest.raises(UserError, match=said):
        resolve(environ)


KUBERNETES = {
    "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "my-run-1", "LTH_TF_SERVICE": "workers",
    "LTH_TF_WORKERS": "2",
}  # fmt: skip


def test_kubernetes():
    there = ("my-run-0.workers:2222", "my-run-1.workers:2222")
    assert resolve(KUBERNETES) == Cluster(there, 1)
    there = ("my-run-0.workers:99", "my-run-1.workers:99")
    assert resolve({**KUBERNETES, "LTH_TF_PORT": "99"}) == Cluster(there, 1)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"LTH_TF_SERVICE": ""}, "LTH_TF_SERVICE is not set"),
        ({"LTH_TF_WORKERS": ""}, "LTH_TF_WORKERS is not set"),
        ({"LTH_TF_WORKERS": "two"}, "LTH_TF_WORKERS is 'two'"),
        ({"LTH_TF_WORKERS": "1"}, "JOB_COMPLETION_INDEX '1'"),
        ({"HOSTNAME": "node7"}, "called 'node7', not '<job>-1'.*completionMode: Indexed"),
    ],
)
def test_a_wrong_kubernetes_job_is_one_clear_sentence(change, said):
    with pytest.raises(UserError, match=said):
        resolve({**KUBERNETES, **change})


WORKER = """
import json, socket, sys
from lth_tf.distribute.cluster import Cluster
from lth_tf.distribute.meeting import meet
from lth_tf.errors import UserError
print("started", flush=True)
workers, index, statement, timeout, problem = json.loads(sys.argv[1])
try:
    meet(Cluster(tuple(workers), index), statement, timeout, problem)
except UserError as error:
    print(error)
else:
    socket.create_server(("127.0.0.1", int(workers[index].split(":")[1]))).close()
    print("met")
assert "tensorflow" not in sys.modules
"""


def addresses(count):
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def start(workers, index, statement=None, timeout=20, problem=None):
    """A worker's process, which has begun to run."""
    words = json.dumps([workers, index, statement or {}, timeout, problem])
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0,  # else communicate() would miss what readline() has read ahead
    )  # fmt: skip
    assert process.stdout.readline() == b"started\n"
    return process


def ends(*processes, within=15):
    """What the workers said in the end."""
    deadline, said = time.monotonic() + within, []
    for process in processes:
        out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        assert process.returncode == 0, err
        said.append(out.decode().strip())
    return said


def everywhere(*processes, within=15):
    """The one sentence that all workers ended with."""
    said = set(ends(*processes, within=within))
    assert len(said) == 1, said
    return said.pop()


def test_workers_meet_in_any_order_and_leave_their_ports_free():
    there, statement = addresses(3), {"rate": 0.1, "levels": (1, 2), "x": float("nan")}
    late = [start(there, index, statement) for index in (2, 1)]
    time.sleep(0.5)
    assert everywhere(start(there, 0, statement), *late) == "met"
    began = time.monotonic()
    meet(Cluster(tuple(addresses(1)), 0), statement, 20)  # alone
    assert time.monotonic() - began < 2


def test_a_missing_worker_is_named_everywhere():
    there = addresses(4)
    said = everywhere(*(start(there, index, timeout=1.5) for index in (0, 2)), within=6)
    assert said.startswith(f"worker 1 at {there[1]} and 3 at {there[3]} did not come within 1.5 s")


def test_a_missing_chief_is_named_by_every_worker():
    there = addresses(3)
    for index, said in enumerate(ends(*(start(there, i, timeout=1) for i in (1, 2)), within=5), 1):
        assert said.startswith(f"worker {index} cannot reach the chief at {there[0]} within 1 s")
        assert "Connection refused" in said


def test_lists_of_workers_that_differ_are_shown():
    there = addresses(3)
    other = [there[0], there[2]]
    said = everywhere(start(there[:2], 0), start(other, 1))
    assert f"{there[0]}, {there[1]} at worker 0" in said
    assert f"{there[0]}, {there[2]} at worker 1" in said


@pytest.mark.parametrize("index", [0, 1])
def test_two_processes_with_one_index_on_one_machine(index):
    there = addresses(3)
    twice = [start(there, index) for _ in range(2)]
    others = [] if index == 0 else [start(there, 0)]
    said = everywhere(*twice, *others, *([start(there, 2)] if index == 0 else []))
    # Which is seen first: that there are two, or that the second one's port is in use.
    assert re.search(f"both say that they are worker {index}|^worker {index}: cannot listen", said)
    assert f"at {there[index]}" in said


def test_two_processes_with_one_index_on_two_machines(monkeypatch):
    there = addresses(3)
    first = [start(there, index) for index in (0, 1)]
    elsewhere = addresses(1)[0]
    monkeypatch.setattr("lth_tf.distribute.meeting._listen", lambda _: listen(elsewhere))
    with pytest.raises(UserError) as caught:
        meet(Cluster(tuple(there), 1), {}, 20)
    said = "two processes, on 127.0.0.1 and 127.0.0.1, both say that they are worker 1, at "
    assert str(caught.value).startswith(said + there[1])
    assert [str(caught.value)] * 2 == ends(*first)


def test_two_chiefs_on_two_machines(monkeypatch):
    """The second one listens at the same port elsewhere; the first one's answer ends it."""
    there = addresses(2)
    first = start(there, 0)
    elsewhere = addresses(1)[0]
    monkeypatch.setattr("lth_tf.distribute.meeting._listen", lambda _: listen(elsewhere))
    with pytest.raises(UserError, match="both say that they are worker 0"):
        meet(Cluster(tuple(there), 0), {}, 20)
    assert "both say that they are worker 0" in ends(first)[0]


def test_statements_that_differ_are_shown_with_both_values_also_to_who_comes_late():
    there = addresses(3)
    statements = [
        {"learning_rate": 0.1, "model": "lenet", "seed": 1},
        {"learning_rate": 0.01, "model": "lenet"},
        {"learning_rate": 0.1, "model": "lenet", "seed": 1},
    ]
    first = [start(there, index, statements[index]) for index in (0, 1)]
    time.sleep(1)
    said = everywhere(*first, start(there, 2, statements[2]))
    assert said == (
        "learning_rate is 0.1 at worker 0, 0.01 at worker 1; seed is 1 at worker 0, missing at "
        "worker 1: start the same command everywhere"
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_problem_of_one_worker_ends_all(index):
    there = addresses(2)
    problems = ["cannot write 'runs'" if i == index else None for i in range(2)]
    said = everywhere(*(start(there, i, problem=problems[i]) for i in range(2)))
    assert said == f"worker {index}: cannot write 'runs'"


def listen(address, reply=None):
    """A server that answers every line it gets with a line, or not at all."""
    host, port = address.split(":")
    server = socket.create_server((host, int(port)))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                line = connection.makefile("rb").readline()
                connection.sendall(reply(line))

    if reply:
        threading.Thread(target=serve, daemon=True).start()
    return server


def test_a_port_in_use_is_told_to_all():
    there = addresses(2)
    with listen(there[1]):
        said = everywhere(*(start(there, index) for index in (0, 1)))
    assert said.startswith(f"worker 1: cannot listen at {there[1]} (Address already in use)")
    with listen(there[0], lambda line: b"\n"):
        said = ends(start(there, 0, timeout=1), within=9)[0]
    assert said.startswith(f"worker 0: cannot listen at {there[0]} (Address already in use)")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "reply",
    [
        lambda line: line,
        lambda line: b"HTTP/1.1 400 Bad Request\r\n\r\n",
        lambda line: b'{"lth_tf": "answer"}\n',
        lambda line: b'{"sentence": null}\n',
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b"x" * (3 << 20),
        lambda line: b"\xff\n",
    ],
    ids=["echo", "http", "no_sentence", "no_mark", "deep", "endless", "not_text"],
)
def test_a_worker_does_not_believe_a_foreign_server(reply):
    there = addresses(2)
    with listen(there[0], reply), pytest.raises(UserError, match="cannot reach the chief"):
        meet(Cluster(tuple(there), 1), {}, 0.5)


def test_a_chief_is_not_disturbed_by_strangers():
    there = addresses(3)
    chief = start(there, 0)
    host, port = there[0].split(":")
    claim = {"lth_tf": "claim", "workers": there, "statement": {}, "problem": None}
    sent = [
        b"", b"\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\xff\xfe\n",
        b"[" * 100_000 + b"\n", b"x" * (2 << 20), b"null\n", b"{}\n", b'{"lth_tf": "claim"}\n',
        json.dumps({**claim, "index": 9}).encode() + b"\n",
        json.dumps({**claim, "index": "1"}).encode() + b"\n",
    ]  # fmt: skip
    strangers = []
    for _ in range(100):
        try:
            strangers.append(socket.create_connection((host, int(port)), 5))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    for content in sent:
        connection = socket.create_connection((host, int(port)), 5)
        try:
            connection.sendall(content)
        except OSError:
            assert len(content) > 1 << 20  # was cut off
        strangers.append(connection)
    strangers.pop().close()
    gone = start(there, 1)
    time.sleep(0.5)
    gone.kill()  # after its claim; another one takes its index
    gone.communicate()
    assert everywhere(chief, start(there, 1), start(there, 2)) == "met"
    for connection in strangers:
        connection.close()


TRAINING = """
from lth_tf.distribute import cluster, meeting
import tensorflow as tf
here = cluster.resolve()
meeting.meet(here, {"seed": 1}, 60)
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec({"worker": list(here.workers)}), task_type="worker", task_id=here.index,
    rpc_layer="grpc")
strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
@tf.function
def total():
    def one():
        context = tf.distribute.get_replica_context()
        return context.all_reduce("sum", tf.constant(here.index + 1.0))
    return tf.reduce_sum(strategy.experimental_local_results(strategy.run(one))[0])
print("sum", float(total()), "of", strategy.num_replicas_in_sync)
"""


@pytest.mark.slow
def test_tensorflow_takes_the_same_ports_at_once():
    done = subprocess.run(
        [sys.executable, "-m", "lth_tf.tools.launch_local", "--workers=2", "--grace=5", "--",
         sys.executable, "-c", TRAINING],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"\[\d\] sum.*", done.stdout)) == [
        "[0] sum 3.0 of 2",
        "[1] sum 3.0 of 2",
    ]
