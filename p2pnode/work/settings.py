"""Every setting of this layer, with its unit. Applied live: a service is handed a new `WorkSettings` and keeps nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkSettings:
    """What the owner lends. Immutable; change it with `dataclasses.replace` and `WorkService.apply`."""

    # The processor. At most floor(cores x cpu_fraction / threads_per_worker) workers, at least one, run at the same time.
    cpu_fraction: float = 1.0  # of all cores, 0 < cpu_fraction <= 1
    cores: int = 1  # threads this machine has, filled in by the node from what it finds
    threads_per_worker: int = 1
    workers_per_model_max: int = 4  # of one model for one owner
    worker_calls_max: int = 8  # calls handed to one worker at a time
    worker_backlog_seconds: float = 0.02  # expected time of the calls handed over at once; longer calls go one by one
    worker_idle_seconds: float = 600.0  # a worker without calls for this long is ended
    execution_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    optimise: bool = True  # ONNX Runtime's graph optimisations

    # Memory, in bytes. A worker is counted as worker_base_bytes + 2 x its model's size.
    memory_bytes: int = 4 << 30  # all workers together
    worker_memory_bytes: int = 3 << 30  # address space of one worker beyond the zygote's
    worker_base_bytes: int = 48 << 20
    arena_bytes: int = 256 << 20  # shared memory of one worker for outputs and inputs; see `work.arena.Arena`

    # Disk: all stored models, bytes; the least recently used go first.
    disk_bytes: int = 20 << 30

    # Network: bytes a second of call inputs and outputs together; 0 is no limit. The bucket holds one second's worth.
    bandwidth_bytes_per_second: int = 0

    # The queue: calls waiting for a worker.
    queue_max: int = 256
    queue_per_owner_max: int = 128
    queue_bytes_max: int = 256 << 20  # inputs held outside the arenas while they wait

    # Deadlines, seconds of wall clock, kept by SIGKILL.
    load_seconds: float = 60.0
    call_seconds_max: float = 120.0
    inspect_seconds: float = 30.0

    # Batching: calls of one model joined into one run. batch_size_max 1 turns it off.
    batch_size_max: int = 16
    batch_delay_seconds: float = 0.002  # how long a part-filled batch waits while other workers of the model are busy
    batch_bytes_max: int = 4 << 20  # inputs of one batch; a call over half of it runs alone, copying it would cost more
    batch_rtol: float = 1e-3  # relative difference that an order which accepts tolerance accepts

    # Models.
    graph_bytes_max: int = 256 << 20  # the graph without its large initialisers
    model_bytes_max: int = 16 << 30
    nodes_max: int = 200_000  # counted with subgraphs and expanded functions
    opset_max: int = 26  # of ai.onnx

    # Who and what. Clients are node ids, models are model ids; an empty allow list allows everybody.
    share_workers: bool = True  # clients whose orders allow it too may share a worker
    sandbox_min: str = "full"  # full | gpu | reduced | none: the weakest level at which others' work is accepted
    allow_clients: frozenset[bytes] = frozenset()
    deny_clients: frozenset[bytes] = frozenset()
    allow_models: frozenset[bytes] = frozenset()
    deny_models: frozenset[bytes] = frozenset()

    @property
    def workers_max(self) -> int:
        """Workers that run at the same time, from the processor's share; more may be warm."""
        return max(1, int(self.cores * self.cpu_fraction) // max(1, self.threads_per_worker))
