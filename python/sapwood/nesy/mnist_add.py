"""MNIST addition: learn digits from the sums of numbers that they write.

A pair is two numbers of N digits, least significant first; only the digits of their sum are known
in training. ``addition`` and ``long_addition`` are the sentences, ``load`` makes the pairs from the
bundled digits or from MNIST files, ``train`` learns, and accuracy is that of the arg-max digits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sapwood import _check
from sapwood.data import Dataset, load_digits, load_mnist
from sapwood.nesy.draws import guard, observed
from sapwood.nesy.program import Do, Program, do
from sapwood.nesy.quantifiers import loss
from sapwood.nesy.symbols import Categorical

_MNIST_MEAN, _MNIST_DEVIATION = 0.1307, 0.3081  # how load_mnist standardises
_TEST_PAIRS_OF_DIGITS = 2000
NETS = ("small", "ltn", "dpl")

Batch = tuple[Tensor, Tensor, Tensor]  # xs, ys (B, N, 1, H, W) and the sum's digits (B, N + 1)


@dataclass(frozen=True)
class Pairs:
    """Two numbers per row, as images of their digits, and the digits of their sum.

    Digits stand least significant first. Slicing gives the images ``xs`` and ``ys``,
    (B, N, 1, H, W), and ``sums``, (B, N + 1) int64.
    """

    images: Tensor  # (n, 1, H, W)
    labels: Tensor  # (n,)
    index: Tensor  # (pairs, 2, N) int64, into the images

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        chosen = self.index[rows]
        return self.images[chosen[:, 0]], self.images[chosen[:, 1]], self.sums(rows)

    def digits(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """(B, 2, N) the digits themselves, which training does not see."""
        return self.labels[self.index[rows]]

    def sums(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """(B, N + 1) the digits of the sums, exact for any N."""
        return sum_digits(self.digits(rows))


def sum_digits(digits: Tensor, base: int = 10) -> Tensor:
    """Adds numbers digit by digit: (B, 2, N), least significant first, to (B, N + 1).

    Example:
        >>> import torch
        >>> from sapwood.nesy import mnist_add
        >>> mnist_add.sum_digits(torch.tensor([[[9, 9], [1, 0]]]))  # 99 + 1
        tensor([[0, 0, 1]])
    """
    columns = digits.sum(1)  # (B, N)
    carry = torch.zeros_like(columns[:, 0])
    result = []
    for column in columns.unbind(1):
        total = column + carry
        result.append(total % base)
        carry = total // base
    return torch.stack([*result, carry], 1)


@dataclass(frozen=True)
class Task:
    """Training and test pairs of one size."""

    name: str
    source: str
    train: Pairs
    test: Pairs
    seed: int

    @property
    def num_digits(self) -> int:
        """N, the digits of each number."""
        return self.train.index.shape[2]

    def batches(self, size: int, epoch: int = 0) -> Iterator[Batch]:
        """The training pairs once, in an order that the seed and the epoch decide.

        With N = 1 images are (B, 1, H, W) and the sums themselves (B,), from 0 to 18.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 1)
        for rows in torch.randperm(len(self.train), generator=generator).split(size):
            yield self.fitted(self.train[rows])

    def fitted(self, batch: Batch) -> Batch:
        """A batch in the form of the sentence of this N."""
        xs, ys, sums = batch
        if self.num_digits > 1:
            return batch
        return xs[:, 0], ys[:, 0], sums[:, 0] + 10 * sums[:, 1]


def load(
    data: str | os.PathLike[str] = "digits",
    num_digits: int = 1,
    num_train: int = 3000,
    seed: int = 0,
    pairing: str = "random",
) -> Task:
    """Makes the pairs.

    Example:
        >>> from sapwood.nesy import mnist_add
        >>> task = mnist_add.load("digits", num_digits=2, num_train=100)
        >>> xs, ys, sums = task.train[:4]
        >>> xs.shape, sums.shape
        (torch.Size([4, 2, 1, 8, 8]), torch.Size([4, 3]))

    Args:
        data: "digits", scikit-learn's 8 x 8 images (training pairs are then drawn with replacement
            from 1 297 images, 2 000 test pairs from 500 others), or a folder with the four idx
            files of MNIST (training images are used once, test pairs go through the test images).
        num_digits: N.
        num_train: training pairs.
        seed: of the pairing.
        pairing: "random", or "sequential" to pair MNIST images in the order of the file.

    Raises:
        ValueError: for N < 1, no pairs, an unknown pairing, or too few images.
        ModuleNotFoundError: when the digits are asked for and scikit-learn is not installed.
        MissingDataError: when an idx file is not there.
    """
    where = "nesy.mnist_add.load"
    for name, value in (("num_digits", num_digits), ("num_train", num_train)):
        if value < 1:
            _check.fail(ValueError, where, name, "be at least 1", value)
    _check.one_of(where, "pairing", pairing, ("random", "sequential"))
    if str(data) == "digits":
        found = _bundled_digits()
        train = _drawn(len(found.train_labels), num_train, num_digits, seed)
        test = _drawn(len(found.test_labels), _TEST_PAIRS_OF_DIGITS, num_digits, 0)
    else:
        found = load_mnist(data)
        train = _used_once(len(found.train_labels), num_train, num_digits, seed, pairing)
        tests = len(found.test_labels) // (2 * num_digits)
        test = torch.arange(tests * 2 * num_digits).view(tests, 2, num_digits)
    train_pairs = Pairs(_pixels(found, found.train_images), found.train_labels, train)
    test_pairs = Pairs(_pixels(found, found.test_images), found.test_labels, test)
    return Task(found.name, found.source, train_pairs, test_pairs, seed)


def _drawn(images: int, pairs: int, num_digits: int, seed: int) -> Tensor:
    """Pairs of images drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(images, (pairs, 2, num_digits), generator=generator)


def _used_once(images: int, pairs: int, num_digits: int, seed: int, pairing: str) -> Tensor:
    """Pairs of the first images, each used once."""
    needed = 2 * num_digits * pairs
    if needed > images:
        want = f"need at most {images} images"
        _check.fail(
            ValueError, "nesy.mnist_add.load", "2 * num_digits * num_train", want, needed
        )  # fmt: skip
    order = torch.arange(needed)
    if pairing == "random":
        order = torch.randperm(needed, generator=torch.Generator().manual_seed(seed))
    return order.view(pairs, 2, num_digits)


def _bundled_digits() -> Dataset:
    try:
        return load_digits(test_share=500 / 1797, seed=0)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sapwood.nesy.mnist_add: the bundled digits need scikit-learn: "
            "pip install 'sapwood[tour]'"
        ) from error


def _pixels(found: Dataset, images: Tensor) -> Tensor:
    """Pixels in [0, 1]."""
    return images * _MNIST_DEVIATION + _MNIST_MEAN if found.name == "mnist" else images


def network(name: str, seed: int = 0) -> nn.Sequential:
    """The networks of the tables, (B, 1, H, W) to (B, 10) logits, their weights drawn with a seed.

    Example:
        >>> import torch
        >>> from sapwood.nesy import mnist_add
        >>> mnist_add.network("ltn")(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Args:
        name: "small" for 8 x 8 images; "ltn" (ELU before pooling, 100 hidden units) or "dpl" (ReLU
            after pooling, 120) for 28 x 28.
        seed: of the weights; torch's generator is left as it is.

    Raises:
        ValueError: for another name.
    """
    _check.one_of("nesy.mnist_add.network", "name", name, NETS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == "small":
            return nn.Sequential(
                *_block(1, 16, 3, nn.ELU, padding=1), *_block(16, 32, 3, nn.ELU, padding=1),
                nn.Flatten(), nn.Linear(128, 64), nn.ELU(), nn.Linear(64, 10),
            )  # fmt: skip
        hidden, activation = (100, nn.ELU) if name == "ltn" else (120, nn.ReLU)
        return nn.Sequential(
            *_block(1, 6, 5, activation, before=name == "ltn"),
            *_block(6, 16, 5, activation, before=name == "ltn"),
            nn.Flatten(), nn.Linear(256, hidden), activation(), nn.Linear(hidden, 84), activation(),
            nn.Linear(84, 10),
        )  # fmt: skip


def _block(
    inputs: int,
    outputs: int,
    size: int,
    activation: type[nn.Module],
    *,
    padding: int = 0,
    before: bool = True,
) -> list[nn.Module]:
    convolution, pool = nn.Conv2d(inputs, outputs, size, padding=padding), nn.MaxPool2d(2)
    return [convolution, activation(), pool] if before else [convolution, pool, activation()]


def sentence(digit: Categorical, num_digits: int) -> Do:
    """The sentence "the two numbers have this sum", for batches of a :class:`Task` of this N.

    Example:
        >>> import torch
        >>> from sapwood import nesy
        >>> digit = nesy.Categorical(torch.nn.Linear(4, 10), range(10), name="digit")
        >>> add = nesy.mnist_add.sentence(digit, 1)
        >>> add(torch.zeros(3, 4), torch.zeros(3, 4), nesy.observed(torch.tensor([0, 9, 18])))
        Program(...)

    Args:
        digit: the symbol that reads an image.
        num_digits: N; from 2 on the sum is given by its digits and the carry is passed on.
    """

    @do(static=True)
    def addition(x: Tensor, y: Tensor, n: Any) -> Generator[Any, Any, Any]:
        d1 = yield digit(x)
        d2 = yield digit(y)
        return d1 + d2 == n

    @do
    def add_digit(a: Tensor, b: Tensor, carry: Any, n: Any) -> Generator[Any, Any, Any]:
        total = (yield digit(a)) + (yield digit(b)) + carry
        yield guard(total % 10 == n)
        return total // 10

    @do(static=True)
    def long_addition(xs: Tensor, ys: Tensor, n: Any) -> Generator[Any, Any, Any]:
        carry: Any = 0
        for i in range(xs.shape[1]):
            carry = yield add_digit(xs[:, i], ys[:, i], carry, n[:, i])
        return carry == n[:, -1]

    return addition if num_digits == 1 else long_addition


@dataclass
class Settings:
    """How to train."""

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    net: str = "small"
    seed: int = 0
    strict: bool = False  # build the joint of all digits instead of eliminating


@dataclass
class Trained:
    """A trained reader of digits and how well it adds."""

    digit: Categorical
    sum_accuracy: float
    digit_accuracy: float
    train_sum_accuracy: float
    marginal_accuracy: float | None  # of the most probable sum, for N = 1
    seconds: float  # of training, without evaluation
    losses: list[float] = field(default_factory=list)  # mean of each epoch


def train(
    task: Task,
    settings: Settings | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Learns digits from sums by Adam on the mean negative log truth.

    Example:
        >>> from sapwood.nesy import mnist_add
        >>> task = mnist_add.load("digits", num_train=64)
        >>> result = mnist_add.train(task, mnist_add.Settings(epochs=1))
        >>> len(result.losses)
        1

    Args:
        task: from :func:`load`.
        settings: epochs, batch size, learning rate, network and seed.
        on_step: called after every step with the steps done, all steps, and the loss.

    Returns:
        The symbol and its accuracies after the last epoch; there is no early stopping.
    """
    s = settings or Settings()
    digit = Categorical(network(s.net, s.seed), range(10), name="digit")
    formula = sentence(digit, task.num_digits)
    optimizer = torch.optim.Adam(digit.parameters(), s.lr)
    total = s.epochs * -(-len(task.train) // s.batch_size)
    losses, done, start = [], 0, time.perf_counter()
    for epoch in range(s.epochs):
        running = 0.0
        for xs, ys, sums in task.batches(s.batch_size, epoch):
            program = formula(xs, ys, observed(sums))
            value = -program.log_truth(strict=True).mean() if s.strict else loss(program)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            done += 1
            current = float(value.detach())
            running += current * len(sums)
            if on_step is not None:
                on_step(done, total, current)
        losses.append(running / len(task.train))
    seconds = time.perf_counter() - start
    test_sum, test_digit = accuracy(digit, task.test)
    train_sum, _ = accuracy(digit, task.train)
    marginal = marginal_accuracy(digit, task.test) if task.num_digits == 1 else None
    return Trained(digit, test_sum, test_digit, train_sum, marginal, seconds, losses)


@torch.no_grad()
def log_probabilities(digit: Categorical, images: Tensor) -> Tensor:
    """(n, 10) of many images, in chunks."""
    return torch.cat([digit.log_weights(part) for part in images.split(2000)])


def accuracy(digit: Categorical, pairs: Pairs) -> tuple[float, float]:
    """Shares of sums and of digits that the arg-max digits get right."""
    read = log_probabilities(digit, pairs.images).argmax(-1)[pairs.index]  # (pairs, 2, N)
    truth = pairs.digits()
    sums = (sum_digits(read) == sum_digits(truth)).all(1)
    return float(sums.double().mean()), float((read == truth).double().mean())


@torch.no_grad()
def marginal_accuracy(digit: Categorical, pairs: Pairs) -> float:
    """The share of pairs of single digits whose most probable sum is right."""
    log_p = log_probabilities(digit, pairs.images)[pairs.index[:, :, 0]]  # (pairs, 2, 10)

    @do
    def total() -> Generator[Any, Any, Any]:
        first = yield reader(log_p[:, 0])
        second = yield reader(log_p[:, 1])
        return first + second

    reader = Categorical(nn.Identity(), range(10), name="reader")
    program: Program = total()
    best = program.distribution().log_prob.argmax(-1)
    return float((best == pairs.digits()[:, :, 0].sum(1)).double().mean())
