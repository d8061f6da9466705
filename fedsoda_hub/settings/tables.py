"""Declare the tables of RUN.toml: each key with its type, range, default and meaning. Data alone, which knows no algorithm.

Errors say what `Meta` allows, `--help` and the guide what it describes (`keys.py`). A default is the same for all methods
unless `methods.py` has another one; which keys go together is `combine.py`'s.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fedsoda_edge.protocol.coded import Codec
from fedsoda_edge.protocol.manifest import Base
from fedsoda_edge.protocol.messages import LocalSettings

MethodName = Literal["fedsoda", "exact", "fedbiot", "fedot", "fedpetuning", "fedpruner", "fedpruner+"]
GroupDistance = Literal["healed", "angular"]
LayerChoice = Literal["contiguous", "spectral", "uniform", "random", "top"]
Rule = Literal["fedavg", "ffa", "rolora", "flexlora"]
Optimizer = Literal["none", "fedavgm", "fedadam", "fedyogi"]
NoticeName = Literal["run_over", "below_quorum", "edge_gone", "disk_low", "compute_failed", "round_closed", "evaluated"]
Robust = Literal["none", "clip", "median", "trimmed", "krum", "centered-clip"]

MAX_SEED = 2**63 - 1  # what torch's generators take
SELF_GENERATED = "self-generated"  # instead of a file of [public]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The root of all tables that people write."""


class Method(Section, frozen=True):
    """[method]: which layers edges receive, which of them train, and how they are stored."""

    name: Annotated[MethodName, Meta(description="the federated method")] = "fedsoda"
    emulator: Annotated[
        Literal["sub", "full"],
        Meta(description="what edges receive below the adapter: sub, what pruning leaves, aligned; full, all layers"),
    ] = "sub"
    adapter_layers: Annotated[
        int, Meta(ge=0, description="last layers of the full LLM, which train; 1 or more where there is an adapter")
    ] = 3
    bottom_layers: Annotated[int, Meta(ge=0, description="first layers of the full LLM, which train too")] = 0
    layers_per_group: Annotated[int, Meta(ge=0, description="layers that are removed from each pruned group")] = 3
    groups: Annotated[
        Annotated[int, Meta(ge=0, description="groups of similar layers that are pruned")] | Literal["auto"],
        Meta(description="auto: the number and size that keep the sub-LLM nearest to the full LLM within bundle_bytes"),
    ] = 4
    distance: Annotated[
        GroupDistance,
        Meta(
            description="what groups are chosen by: healed, the error that is left where a group is healed; angular, the "
            "angle between the states of the last token, as in the paper"
        ),
    ] = "healed"
    bundle_bytes: Annotated[
        int, Meta(ge=0, description='bytes that all files of the sub-LLM may take on an edge, with groups = "auto"')
    ] = 0
    classes: Annotated[
        list[int],
        Meta(
            description="further, smaller sub-LLMs: ascending numbers of groups, for fedpruner of dropped layers; an "
            "edge takes the largest sub-LLM that it has room for"
        ),
    ] = msgspec.field(default_factory=list)
    drop_layers: Annotated[int, Meta(ge=0, description="layers that are dropped in all")] = 0
    layer_choice: Annotated[
        LayerChoice,
        Meta(
            description="which layers are kept: the most important one of each contiguous or spectral group; to "
            "compare with, uniform, random, or all but the top ones"
        ),
    ] = "contiguous"
    reprune_every: Annotated[int, Meta(ge=0, description="rounds between drawings of other layers; 0: never")] = 0
    realign_every: Annotated[
        Annotated[int, Meta(ge=0, description="rounds between alignments; 0: only the first")] | Literal["auto"],
        Meta(description="auto: whenever the sub-LLM is measured to have drifted"),
    ] = 0
    adapter_base: Annotated[
        Base, Meta(description="how the layers of the adapter are stored; bf16: in the checkpoint's own dtype")
    ] = "nf4"
    emulator_base: Annotated[Base, Meta(description="how the layers of the emulator are stored")] = "nf4"
    quantize_embedding: Annotated[bool, Meta(description="store embedding and head in NF4 too")] = False


class LoRA(Section, frozen=True):
    """[lora]: the tensors that train."""

    rank: Annotated[int, Meta(ge=1, le=1024, description="rank of LoRA, of the master and of the export")] = 8
    alpha: Annotated[float, Meta(gt=0, description="LoRA is added alpha / rank times")] = 16.0
    targets: Annotated[list[str], Meta(min_length=1, description="modules that carry LoRA")] = msgspec.field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    )
    start_from: Annotated[
        str | None,
        Meta(
            description="a directory that `fedsoda-hub export` wrote, whose LoRA the run begins with; not given: fresh LoRA"
        ),
    ] = None
    ranks: Annotated[
        list[int], Meta(description="a rank for each size class, from the largest on; empty: all have rank")
    ] = msgspec.field(default_factory=list)

    def of_class(self, size_class: int) -> int:
        """Return the rank of a size class, 0 the largest."""
        return self.ranks[size_class] if self.ranks else self.rank


class Public(Section, frozen=True):
    """[public]: the text that the hub measures and aligns on."""

    text: Annotated[str, Meta(description="a file of public text; self-generated: the full LLM writes it")]
    like_task: Annotated[
        str,
        Meta(
            description="a file of rows with the columns of [task] prompt, and of completion where there are labels, on "
            "which layers are healed and the border map is fitted; self-generated: the full LLM writes them"
        ),
    ] = SELF_GENERATED
    sequences: Annotated[int, Meta(ge=1, description="blocks of public text")] = 128
    length: Annotated[int, Meta(ge=2, description="tokens of a block")] = 512


class Align(Section, frozen=True):
    """[align]: how the sub-LLM is brought near the full LLM."""

    heal: Annotated[
        bool,
        Meta(
            description="refit each kept layer below the adapter in closed form before it is stored, so that it does the "
            "work of the layers removed above it too, and makes good what rounding to NF4 changes"
        ),
    ] = True
    border_map: Annotated[
        Literal["auto", "ridge", "none"],
        Meta(
            description="the linear map from sub-emulator to adapter: ridge, fitted after every alignment; auto, "
            "fitted only where there are prompts to fit it on"
        ),
    ] = "none"
    border_rank: Annotated[
        int, Meta(ge=1, description="largest rank of the border map; from the model's width on the map is not reduced")
    ] = 256
    steps: Annotated[int, Meta(ge=0, description="steps of the alignment before round 1")] = 0
    realign_steps: Annotated[int, Meta(ge=0, description="steps of each later alignment")] = 30
    batch_size: Annotated[int, Meta(ge=1, description="blocks of public text in a step")] = 8
    learning_rate: Annotated[float, Meta(ge=0, description="AdamW's learning rate")] = 1e-4
    representation_weight: Annotated[float, Meta(ge=0, description="weight of the loss on layer outputs")] = 1.0
    kl_weight: Annotated[float, Meta(ge=0, description="weight of the KL loss on answers")] = 1.0


class RoundSettings(Section, frozen=True):
    """[rounds]: who takes part in a round, and when it closes."""

    count: Annotated[int, Meta(ge=1, description="rounds to run")] = 20
    min_edges: Annotated[int, Meta(ge=1, description="edges that must be here before a round opens")] = 1
    cohort: Annotated[int, Meta(ge=1, description="edges that a round invites at most")] = 10
    quorum: Annotated[
        float, Meta(gt=0, le=1, description="share of the invited edges whose updates are enough at the deadline")
    ] = 0.8
    deadline_seconds: Annotated[float, Meta(gt=0, description="seconds from a round's opening to its deadline")] = (
        3600.0
    )
    max_weight: Annotated[
        float, Meta(ge=1, description="an edge counts at most this many times the round's median number of examples")
    ] = 3.0


class Aggregation(Section, frozen=True):
    """[aggregation]: how updates become the master."""

    rule: Annotated[
        Rule,
        Meta(
            description="fedavg averages A and B apart; ffa trains B alone, rolora B in odd and A in even rounds; "
            "flexlora takes the SVD of the mean product"
        ),
    ] = "fedavg"
    robust: Annotated[
        Robust,
        Meta(
            description="how far a few edges can move the model: none, as far as they like; clip brings every update to the "
            "round's median length at most; centered-clip does so around where most updates are; trimmed and median cut "
            "the extremes of each value; krum leaves out the updates that are far from the others"
        ),
    ] = "none"
    robust_share: Annotated[
        float, Meta(ge=0, lt=0.5, description="share of edges that may be attackers; trimmed and krum read it")
    ] = 0.2
    optimizer: Annotated[Optimizer, Meta(description="the hub's own step; none takes the mean itself")] = "none"
    learning_rate: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="learning rate of the hub's optimizer; not given: 1 for fedavgm, 0.001 for fedadam and fedyogi, "
            "whose step is about this long whatever the deltas"
        ),
    ] = None
    beta1: Annotated[float, Meta(ge=0, lt=1, description="decay of the first moment; the momentum of fedavgm")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="decay of the second moment")] = 0.99
    tau: Annotated[float, Meta(gt=0, description="what is added to the root of the second moment")] = 1e-3

    @property
    def step_size(self) -> float:
        """The learning rate in force."""
        if self.learning_rate is None:
            return 1.0 if self.optimizer == "fedavgm" else 1e-3
        return self.learning_rate


class Wire(Section, frozen=True):
    """[wire]: how updates travel."""

    codec: Annotated[
        Codec,
        Meta(
            description="how deltas are coded: about 4, 8, 16, 0.35 or 0.87 bits a value; nf4-weight codes whole weights, "
            "as in the paper"
        ),
    ] = "nf4"
    stall_seconds: Annotated[float, Meta(gt=0, description="seconds without a byte after which an upload is ended")] = (
        60.0
    )


class Task(Section, frozen=True):
    """[task]: what a row of data becomes, and what accuracy is judged on."""

    prompt: Annotated[str, Meta(description="template of what is asked; {column} is that column of a row")] = "{prompt}"
    completion: Annotated[str, Meta(description="template of what is trained and judged")] = "{completion}"
    choices: Annotated[
        Literal["auto", "none"],
        Meta(description="auto: judge among the completions of the evaluation data where they are few"),
    ] = "auto"
    shots: Annotated[int, Meta(ge=0, le=64, description="answered rows before each question")] = 0
    eval_data: Annotated[str | None, Meta(description="a file of rows to judge on")] = None
    eval_every: Annotated[int, Meta(ge=0, description="rounds between evaluations; 0: only after the last round")] = 0
    keep: Annotated[
        Literal["last", "best"],
        Meta(
            description="the round that export, evaluate and report are of: the last, or the best evaluated one by metric"
        ),
    ] = "last"
    metric: Annotated[
        Literal["accuracy", "loss", "auc", "mean_rank"],
        Meta(
            description="the plug-in's figure that says which round is best: the highest accuracy or auc, the least loss or mean_rank"
        ),
    ] = "accuracy"

    @property
    def best_by(self) -> Literal["accuracy", "loss", "auc", "mean_rank"] | None:
        """The figure by which the best round is kept; None: the last one counts."""
        return self.metric if self.keep == "best" else None


def is_loopback_name(host: str) -> bool:
    """Tell whether a name or address is that of this machine alone."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class Listen(Section, frozen=True):
    """[listen]: where the hub is reached."""

    host: Annotated[str, Meta(description="address to listen on; 0.0.0.0: all of this machine's")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0: any that is free")] = 8470
    public_url: Annotated[
        str | None,
        Meta(description="address at which edges reach the hub, such as https://hub.example.org; not given: a guess"),
    ] = None

    @property
    def is_loopback(self) -> bool:
        """Whether the hub is reached from its own machine alone."""
        return is_loopback_name(self.host)


class TLS(Section, frozen=True):
    """[tls]: how what travels is encrypted."""

    mode: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="whether the hub speaks TLS by itself; auto: beyond its own machine; off: only behind a proxy that does"
        ),
    ] = "auto"
    certificate: Annotated[
        str | None,
        Meta(description="a PEM file with a certificate of your own and its chain; not given: the hub makes one"),
    ] = None
    key: Annotated[
        str | None, Meta(description="the PEM file of its key; not given: the file of the certificate holds it too")
    ] = None


class Blobs(Section, frozen=True):
    """[blobs]: where the files of the bundle lie beside the hub."""

    mirrors: Annotated[
        list[str],
        Meta(
            description="URLs below which the files of `fedsoda-hub bundle` lie, at most 8; edges ask there first, verify "
            "what comes, and take from the hub what does not"
        ),
    ] = msgspec.field(default_factory=list)


class Notify(Section, frozen=True):
    """[notify]: whom the hub tells what happened."""

    command: Annotated[
        list[str],
        Meta(description="a program and its arguments, which gets each event as JSON on its stdin; empty: none"),
    ] = msgspec.field(default_factory=list)
    webhook: Annotated[
        str | None, Meta(description="an address that each event is posted to as JSON; not given: none")
    ] = None
    secret: Annotated[
        str | None,
        Meta(
            description="a file with the secret that signs what is posted; not given: the hub makes NAME.run/webhook.secret"
        ),
    ] = None
    insecure_http: Annotated[bool, Meta(description="post over plain http beyond this machine too")] = False
    events: Annotated[list[NoticeName], Meta(description="what is told")] = msgspec.field(
        default_factory=lambda: ["run_over", "below_quorum", "edge_gone", "disk_low", "compute_failed"]
    )
    disk_low_bytes: Annotated[int, Meta(ge=0, description="free bytes of disk below which disk_low is told")] = (
        5_000_000_000
    )
    timeout_seconds: Annotated[
        float, Meta(gt=0, le=600, description="seconds that a program, or a try to post, may take")
    ] = 10.0


class ReportSettings(Section, frozen=True):
    """[report]: what is written of the run while it is served, beside its ledger."""

    tensorboard: Annotated[
        str | None, Meta(description="a directory of event files for TensorBoard; not given: none are written")
    ] = None


class Tables(Section, frozen=True):
    """All tables of RUN.toml."""

    name: Annotated[
        str,
        Meta(
            pattern=r"\A[\w-]*[^\W_][\w-]*\Z",
            description="the run's name; its directory is NAME.run",
            extra={"allowed": "letters, digits, - and _"},
        ),
    ]
    model: Annotated[str, Meta(description="a model directory, or the id of a model on the Hugging Face Hub")]
    public: Public
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED, description="seed of everything that is drawn by chance")] = 0
    device: Annotated[
        str,
        Meta(
            pattern=r"\A(auto|cpu|cuda(:\d+)?)\Z",
            description="where the hub computes; auto: on a GPU if there is one",
            extra={"allowed": "auto, cpu, cuda or cuda:N"},
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        Meta(description="what the hub computes in, on a CPU where that has instructions for it, otherwise in float32"),
    ] = "bfloat16"
    method: Method = msgspec.field(default_factory=Method)
    lora: LoRA = msgspec.field(default_factory=LoRA)
    align: Align = Align()
    rounds: RoundSettings = RoundSettings()
    aggregation: Aggregation = Aggregation()
    local: LocalSettings = LocalSettings()
    wire: Wire = Wire()
    task: Task = Task()
    listen: Listen = Listen()
    blobs: Blobs = msgspec.field(default_factory=Blobs)
    tls: TLS = TLS()
    notify: Notify = msgspec.field(default_factory=Notify)
    report: ReportSettings = ReportSettings()
