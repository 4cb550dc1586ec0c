"""Strict, frozen configuration sections.

:mod:`fedslm.validation` checks for contradictions between sections.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal

from pydantic import Field

from fedslm.config.aggregation import (
    AggregationConfig,
    AttackConfig,
    CompressionConfig,
    PersonalizationConfig,
    SecureAggregationConfig,
)
from fedslm.config.base import (
    CountOrAuto,
    DeviceName,
    Names,
    OptionalCount,
    OptionalNumber,
    OptionalText,
    Ranks,
    Section,
    TaskName,
    Unit,
)
from fedslm.config.distillation import DistillConfig
from fedslm.records import LARGEST_DELTA


class RunConfig(Section):
    """Name, directory and seed of the run."""

    name: str = Field("run", min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run: letters, digits, dot, dash and underscore."""
    directory: OptionalText = None
    """Run directory; absent means runs/NAME."""
    seed: int = Field(0, ge=0)
    """Seed of everything reproducible. Privacy noise never depends on it."""


class ModelConfig(Section):
    """The frozen base model."""

    base: str = Field(min_length=1)
    """Hub name, local directory, or "demo" (embedded and tiny) or "demo-large" (twice as wide)."""
    revision: OptionalText = None
    """Hub revision (commit, tag or branch)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen base; the adapter is always float32. "auto": bfloat16 for a base of at
    least 100 million parameters where the processor or the GPU has it in hardware, else float32; also
    float32 with privacy.passes = "shared". float16 is only read from runs of earlier versions."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Store the frozen base's linear layers in 8 or 4 bits; the adapter stays float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    device: DeviceName = "auto"
    """Where clients compute."""


class LoraConfig(Section):
    """The adapter."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank r of B·A."""
    alpha: float = Field(8.0, gt=0)
    """Scaling numerator; the update is (alpha / rank)·B·A."""
    rslora: bool = False
    """Scale by alpha / √rank instead: a high rank then learns as fast as a low one."""
    target_modules: Names = ("all-linear",)
    """Names of layers to adapt (suffixes such as "query"), "usual" for the architecture's own, or
    "all-linear"."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """LoRA dropout; must be 0 under privacy."""
    initial: Literal["orthonormal", "eva"] = "orthonormal"
    """Initialisation of A: seeded orthonormal rows, or (eva) the principal directions of each layer's
    inputs on public examples. EVA captures far more of an input: use a lower alpha with it."""
    client_ranks: Ranks = ()
    """Ranks of the clients, assigned in turn; absent means all have lora.rank."""

    @property
    def scaling(self) -> float:
        """The factor s of s·B·A.

        References:
            Kalajdzievski 2023, rsLoRA (arXiv 2312.03732).

        >>> LoraConfig(rank=4, alpha=8.0).scaling, LoraConfig(rank=4, alpha=8.0, rslora=True).scaling
        (2.0, 4.0)
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class DataConfig(Section):
    """Where examples come from and, in simulation, how they are divided among clients."""

    source: str = Field(min_length=1)
    """Hub name, a local file or directory, a database URL (with the two queries), or "demo"."""
    train_split: str = "train"
    """Split (or file stem) that is divided among the clients: private."""
    evaluation_split: str = "test"
    """Split (or file stem) that the server evaluates on: public."""
    evaluation_source: OptionalText = None
    """Source of the evaluation split if it is not `source`."""
    public_source: OptionalText = None
    """Source of public records that training may use (see lora.initial and task.head)."""
    public_split: OptionalText = None
    """Split (or file stem) of the public records; if public_source is absent too, there are none."""
    train_query: OptionalText = None
    """SQL that gives the training rows, if `source` is a database URL."""
    evaluation_query: OptionalText = None
    """SQL that gives the public evaluation rows, if they come from a database."""
    text_column: str = "text"
    """Column with the input: text, list of words (token-classification), prompt, document, or a
    conversation's turns (instruction, preference)."""
    label_column: OptionalText = "label"
    """Column with the target: class, classes, tags, completion, summary or preferred answer; "" if
    conversations in text_column contain it (instruction)."""
    rejected_column: OptionalText = None
    """Column with the rejected answer (preference)."""
    streaming: bool = False
    """Read, partition and tokenise in pieces: for data larger than memory."""
    partition: Literal["iid", "dirichlet", "shard", "size", "natural"] = "iid"
    """How a simulation divides the training split among clients: evenly, with label skew, few labels
    each, uneven sizes, or by a column."""
    dirichlet_alpha: float = Field(0.5, gt=0)
    """Concentration of the dirichlet (labels) and size (sizes) partitions; small means skewed."""
    partition_column: OptionalText = None
    """Column by whose values dirichlet and shard partitions skew; absent means label_column."""
    shards_per_client: int = Field(2, ge=1)
    """Shards of one label that each client gets (shard partition)."""
    natural_column: str = "client"
    """Column that names the client (natural partition); the largest clients are used."""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of each client's units held out from training (a user is never on both sides); the
    charged metric is measured on it. Without privacy, at most 1,000 clients measure the last
    adapter."""
    max_evaluation_records: int = Field(2000, ge=1)
    """The evaluation split is cut to this many records."""

    @property
    def has_public_records(self) -> bool:
        """Whether there are public records that training may use."""
        return self.public_source is not None or self.public_split is not None


class TaskConfig(Section):
    """The task."""

    name: TaskName
    """What is learned: one class for a text, several, one for each word, the next token, an answer, a
    text from a text, or the better of two answers."""
    max_length: int = Field(64, ge=2)
    """Longest sequence in tokens (prompt and completion together); longer texts are cut and counted."""
    max_target_length: OptionalCount = Field(None, ge=1)
    """Longest completion, summary or answer in tokens; absent means what max_length leaves room for."""
    labels: Names = ()
    """Class names (token-classification: O, B-…, I-…); absent means those of the public split."""
    labels_file: OptionalText = None
    """A public file with one class name on each line, instead of `labels`."""
    pooling: Literal["native", "mean", "normalized"] = "native"
    """Classifier input: the architecture's own (CLS/pooler, last token), the mean of the hidden states,
    or that mean, centered and scaled to length √width, which suits sentence encoders."""
    head: Literal["random", "labels", "public"] = "random"
    """First weights of a classifier on normalized features: small and random, the features of the
    public class names (task.labels), or those fitted to public records (data.public_source)."""
    prompt: OptionalText = None
    """Prompt with columns in braces, such as "Question: {text}"; absent means only the text column."""
    format: Literal["auto", "columns"] = "auto"
    """auto: a generation task that names no columns uses those of the public split (messages,
    conversations, prompt and completion, Alpaca's, …); columns: use the named columns."""
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    """chat: use the tokenizer's chat template; plain: do not; auto: chat if there is one."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the base model (preference)."""


class TrainingConfig(Section):
    """One client's local training in one round."""

    local_steps: int = Field(10, ge=1, le=1_000_000)
    """Optimizer steps of a client in a round."""
    batch_size: int = Field(16, ge=1)
    """Records (unit = "user": users) in a step; under privacy the public constant that the noisy
    sum is divided by."""
    micro_batch_size: int = Field(32, ge=1)
    """A limit on the records in one forward pass. Without privacy a pass also holds at most 512 tokens
    on a CPU and 16,384 on a GPU, padding included."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer; its state is reset each round."""
    learning_rate: float = Field(1e-3, gt=0)
    """Local learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    drift: Literal["none", "fedprox", "scaffold"] = "none"
    """Correction of client drift: fedprox, a pull towards the round's starting adapter; scaffold,
    control variates (SGD, not private)."""
    proximal_strength: float = Field(0.01, gt=0)
    """Strength mu of the FedProx term."""


class PrivacyConfig(Section):
    """The requested privacy; :class:`fedslm.privacy.plan.PrivatePlan` is what will run."""

    unit: Unit
    """Unit of privacy: one record, all records of one user ("patient" is read as "user"), or a whole
    client (with noise = "distributed"); "none" trains without privacy."""
    unit_column: OptionalText = None
    """Column that names the user of a record (unit = "user")."""
    units_per_client: OptionalCount = Field(None, ge=1)
    """About how many units a client has: a public estimate, for the recipe that completes a config; a
    simulation takes the size class of its own data. Not needed if delta, clip_norm, sample_rate and
    training.batch_size are set."""
    max_records_per_unit: OptionalCount = Field(None, ge=1)
    """Most records of one user in a step, chosen at random; public, never looked up in the data."""
    overlapping: bool = False
    """True if a unit may be in several clients: the network's epsilon then composes all clients."""
    epsilon: OptionalNumber = Field(None, gt=0)
    """Budget of each client over the whole run."""
    delta: OptionalNumber = Field(None, gt=0, le=LARGEST_DELTA)
    """Failure probability; well under 1/units of the smallest client."""
    clip_norm: OptionalNumber = Field(None, gt=0)
    """Largest L2 norm of one unit's gradient."""
    sample_rate: OptionalNumber = Field(None, gt=0, le=1)
    """Public probability with which a unit joins a step."""
    noise_multiplier: OptionalNumber = Field(None, gt=0)
    """Noise / clip norm, instead of calibrating to epsilon; epsilon is then the hard limit."""
    noise: Literal["local", "distributed"] = "local"
    """Who adds the noise. "local": each client adds all of it, and its update may be seen;
    "distributed": each adds a share and only sums are seen (secure_aggregation), with far less noise in
    the mean. Epsilon then rests on an assumption: docs/secure-aggregation.md."""
    passes: Literal["shared", "fixed", "isolated"] = "fixed"
    """Which units share a pass: "fixed", those of public shapes that each node tests bit by bit;
    "isolated", none, which is slower; "shared", any: exact only up to rounding, which a crafted adapter
    can amplify."""
    spare_rounds: int = Field(0, ge=0)
    """Extra rounds in the budget, for rounds that are charged and then lost in a crash."""
    metric_noise_multiplier: OptionalNumber = Field(None, gt=0)
    """Noise multiplier of a metric on each client's own data, released every round; absent: none is
    released."""

    @property
    def shares_noise(self) -> bool:
        """True if clients share the noise of private training."""
        return self.unit != "none" and self.noise == "distributed"

    @property
    def shares_passes(self) -> bool:
        """True if units of private training share passes of any shape: rounding couples them."""
        return self.unit != "none" and self.passes == "shared"


class FederationConfig(Section):
    """Clients and rounds."""

    num_clients: int = Field(5, ge=1)
    """Number of clients; the first round waits until exactly this many are connected."""
    nodes: Names = ()
    """Names of the admitted nodes that take part (`fedslm server run`); absent: all of them."""
    clients_per_round: OptionalCount = Field(None, ge=1)
    """Cohort size; absent means all. Sampled by seed and round; no privacy amplification is claimed."""
    rounds: int = Field(10, ge=1)
    """Number of rounds."""
    min_replies: int = Field(1, ge=1)
    """With fewer usable replies the round is recorded and the adapter does not change."""
    min_clients: OptionalCount = Field(None, ge=1)
    """The first round waits for this many admitted nodes (engine.name = "deployed"); absent: all."""
    max_failed_rounds: int = Field(3, ge=1)
    """The run stops, and keeps its adapter, after this many failed rounds in a row."""
    evaluate_every: CountOrAuto = "auto"
    """Rounds between evaluations on the public split; "auto": as often as a quarter of the rounds' time
    allows. The last round is always evaluated."""
    round_deadline_seconds: float = Field(3600.0, gt=0)
    """A reply after this time counts as late and is not used. For nodes whose policy answers later
    (answer_after_seconds) a run extends it, to four times this value at most."""
    join_deadline_seconds: float = Field(120.0, gt=0)
    """How long to wait for the population before the first round."""

    @property
    def cohort_size(self) -> int:
        """Number of clients that one round selects."""
        return self.clients_per_round or self.num_clients


class EngineConfig(Section):
    """Where the clients of a simulation run."""

    name: Literal["local", "ray", "deployed"] = "local"
    """local: worker processes of this machine (or this process); ray: actors of a Ray cluster;
    deployed: real nodes, set by `fedslm server run`."""
    nodes: OptionalText = None
    """File that maps admitted nodes to clients (engine.name = "deployed")."""
    policy: OptionalText = None
    """Policy file that every simulated node enforces; `fedslm policy example` prints one."""
    workers: int = Field(-1, ge=-1)
    """Worker processes; -1 means one for each core or GPU that is free for them, 0 means in this
    process. `fedslm simulate --plan` shows how many."""
    threads_per_worker: int = Field(1, ge=1)
    """Threads of each worker; small matrices are fastest with one."""
    devices: Names = ()
    """Devices of the local engine's workers, such as ["cuda:0", "cuda:1"] or ["cpu"]; each device is
    given to one worker after another. Empty: every GPU that model.device allows, else the CPU."""
    address: OptionalText = None
    """Ray cluster to run on: HOST:PORT, or "auto" for the one that this machine belongs to. Empty: Ray
    is started on this machine for the run. Every node must see run.directory and the base."""
    cpus_per_client: float = Field(1.0, gt=0, le=4096)
    """CPUs that Ray reserves for a worker, which trains one client at a time."""
    gpus_per_client: float = Field(0.0, ge=0, le=64)
    """GPUs that Ray reserves for a worker; 0.5 lets two workers share one, each with its own base."""


class Config(Section):
    """The whole configuration; only entry points and the round loop use it."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    task: TaskConfig
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig
    aggregation: AggregationConfig = AggregationConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    compression: CompressionConfig = CompressionConfig()
    personalization: PersonalizationConfig = PersonalizationConfig()
    attack: AttackConfig = AttackConfig()
    federation: FederationConfig = FederationConfig()
    engine: EngineConfig = EngineConfig()
    distill: DistillConfig = DistillConfig()

    def resolved(self) -> Config:
        """Returns the config with every machine-independent "auto" replaced by its choice."""
        method = self.aggregation.method
        if method == "auto":
            method = "fedit" if self.privacy.unit == "none" else "ffa"
        aggregation, model = self.aggregation.model_copy(update={"method": method}), self.model
        if self.privacy.shares_passes and model.dtype == "auto":
            model = model.model_copy(update={"dtype": "float32"})
        return self.model_copy(update={"aggregation": aggregation, "model": model})

    def sha256(self) -> str:
        """Hash of the settings that determine the result: location and name of the run are excluded."""
        return content_sha256(self.hashed_content())

    def hashed_content(self) -> dict[str, Any]:
        """The settings that :meth:`sha256` covers."""
        content = self.resolved().model_dump(mode="json")
        content.pop("engine")
        if not self.distill.mutual_steps:  # otherwise it is part of the rounds
            content.pop("distill")
        content["run"] = {"seed": self.run.seed}
        content["privacy"].pop("units_per_client")  # it chooses values that are hashed themselves
        if self.privacy.noise == "local":  # likewise, as below
            content["privacy"].pop("noise")
            content.pop("secure_aggregation")
        if self.task.head == "random":  # configs from before this key keep their hash
            content["task"].pop("head")
        return content

    def flat(self) -> dict[str, str | int | float | bool]:
        """Returns the config as Flower's flat run config: scalars under dotted keys."""
        flat: dict[str, str | int | float | bool] = {}
        for section, values in self.model_dump(mode="json").items():
            for key, value in values.items():
                text = ", ".join(map(str, value)) if isinstance(value, list) else value
                flat[f"{section}.{key}"] = "" if text is None else text
        return flat


def content_sha256(content: dict[str, Any]) -> str:
    """Hash of settings, whatever their order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
