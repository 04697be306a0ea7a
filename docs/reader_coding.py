"""Entropy coding (docs/format/rans.md), sections and scales, for reader.py: short and slow."""

import math

import numpy as np

EXP2 = [1.0, -0.6931471805599453, 0.2402265069591007, -0.05550410866482158, 0.009618129107628477]
EXP2 += [-0.0013333558146428443, 0.0001540353039338161, -1.525273380405984e-05]
EXP2 += [1.3215486790144307e-06, -1.0178086009239699e-07]


def need(truth, what):
    if not truth:
        raise ValueError(f"not a waterfill file, or a damaged one: {what}")


def unzigzag(v):
    return (v >> 1) ^ -(v & 1)


class Source:
    """Bytes, taken from the front."""

    def __init__(self, data):
        self.data = memoryview(data)

    def take(self, count, dtype="u1"):
        size = int(count) * np.dtype(dtype).itemsize
        need(size <= len(self.data), "cut short")
        taken, self.data = self.data[:size], self.data[size:]
        return np.frombuffer(taken, dtype).astype(int)

    def byte(self):
        return int(self.take(1)[0])

    def varint(self):
        byte = self.byte()
        return byte if byte < 128 else byte - 128 + (self.varint() << 7)

    def unary(self, count):
        ones = np.flatnonzero(np.unpackbits(np.frombuffer(self.data, "u1")))[:count]
        need(ones.size == count, "unary numbers cut short")
        self.take(ones[-1] // 8 + 1 if count else 0)
        return np.diff(ones, prepend=-1) - 1

    def fixed(self, widths):
        bits = np.unpackbits(self.take((widths.sum() + 7) // 8).astype("u1")).tolist()
        fields = zip(np.cumsum(widths).tolist(), widths.tolist(), strict=True)
        return np.array([sum(bits[end - 1 - i] << i for i in range(w)) for end, w in fields], int)

    def golomb(self, count, order):
        below = self.unary(count) + order
        return self.fixed(below) + (1 << below) - (1 << order)


def parametric(shape, scale, low, size, escape):
    s = math.ldexp(math.prod([math.sqrt(math.sqrt(math.sqrt(2)))] * (scale % 8)), scale // 8 - 8)
    wing = size * escape
    y = t = np.sqrt(np.sqrt(np.abs(np.arange(low - wing, low + size - escape + wing)) / s))
    for _ in range(shape - 1):
        t = np.minimum(t * y, 1e6)
    t = np.minimum(t, 41.0)
    w = np.ldexp(np.polyval(EXP2[::-1], t % 1), 40 - t.astype(int)).astype(int)
    if escape:
        w = np.append(w[wing:-wing], w[:wing].sum() + w[-wing:].sum())
    return frequencies(np.maximum(w, 1))


def frequencies(w):
    """Weights, where there are any, to frequencies that sum to 4096."""
    rare = (w > 0) & (4096 * w < w.sum())
    shared, total = 4096 - rare.sum(), w[~rare].sum()
    f = np.where(rare, 1, np.maximum(w > 0, (2 * shared * w + total) // (2 * total)))
    while f.sum() < 4096:
        f[np.argmax(np.where(w > 0, w / (f + 0.5), -1))] += 1
    while f.sum() > 4096:
        f[np.argmin(np.where(f > 1, w / (f - 0.5), np.inf))] -= 1
    return f


def models(source, classes, size, low=None, escape=0):
    need(size <= 256, "more than 256 symbols")
    kinds, table = source.take(classes), np.zeros((classes, size), int)
    numbers = source.take(np.count_nonzero(kinds))
    for k, number in zip(np.flatnonzero(kinds), numbers, strict=True):
        if kinds[k] == 255:
            table[k, number] = 4096
        else:
            need(kinds[k] <= 16 and low is not None, "kind of a model")
            table[k] = parametric(int(kinds[k]), int(number), low, size, escape)
    steps = source.unary(size * np.count_nonzero(kinds == 0)).reshape(-1, size)
    lengths = np.cumsum(unzigzag(steps), axis=1)
    need(((lengths >= 0) & (lengths <= 13)).all(), "length of a frequency")
    below = np.maximum(lengths - 1, 0)
    table[kinds == 0] = source.fixed(below.ravel()).reshape(-1, size) + (lengths > 0) * (1 << below)
    need((table.sum(axis=1) == 4096).all(), "frequencies do not sum to 4096")
    return table


def layout(freqs, buckets=32):
    slot, width = np.arange(4096), 4096 // buckets
    if freqs.size > buckets:
        symbol = np.repeat(np.arange(freqs.size), freqs)
        return symbol, slot - (np.cumsum(freqs) - freqs)[symbol]
    cut, alias = np.pad(freqs, (0, buckets - freqs.size)), np.arange(buckets)
    start = np.zeros(buckets, int)
    small, large = list(np.flatnonzero(cut < width)), list(np.flatnonzero(cut > width))
    for b in small:  # grows while it is walked
        alias[b] = donor = large[0]
        cut[donor] -= width - cut[b]
        if cut[donor] <= width:
            large.pop(0)
        if cut[donor] < width:
            small.append(donor)
    following = cut.copy()
    for b in np.flatnonzero(alias != np.arange(buckets)):
        start[b] = following[alias[b]]
        following[alias[b]] += width - cut[b]
    bucket, r = slot // width, slot % width
    own = r < cut[bucket]
    return np.where(own, bucket, alias[bucket]), np.where(own, r, start[bucket] + r - cut[bucket])


class Lanes:
    """The states of a block's lanes and the words that they share."""

    def __init__(self, source, count, length, tables):
        self.x, self.words = source.take(count, "<u4"), source.take(length, "<u2")
        self.symbol, self.offset, self.freq = tables
        need((self.x >= 1 << 16).all(), "a state below 2^16")

    def symbols(self, lanes, models):
        """A symbol off each of some lanes, under the models named; no words yet."""
        slot, rest = self.x[lanes] % 4096, self.x[lanes] // 4096
        self.x[lanes] = self.freq[models, slot] * rest + self.offset[models, slot]
        return self.symbol[models, slot]

    def refill(self, lanes):
        low = np.arange(self.x.size)[lanes]
        low = low[self.x[low] < 1 << 16]
        need(low.size <= self.words.size, "words run out")
        self.x[low] = (self.x[low] << 16) + self.words[: low.size]
        self.words = self.words[low.size :]


def blocks(source, rows, cols, table, buckets=32):
    """Each block of a stream: lanes, rows, columns and how many lanes there would be."""
    symbol, offset = np.array([layout(f, buckets) for f in table]).swapaxes(0, 1)
    tables = symbol, offset, np.take_along_axis(table, symbol, axis=1)
    head = source.byte()
    need(not head & 0xE8, "head of a stream")
    lanes, several = 1 << (head & 7), head & 16
    height, panels = source.take(2, "<u4").tolist() if several else (rows, -(-cols // lanes))
    need(0 < height <= rows and 0 < panels <= -(-cols // lanes), "size of blocks")
    width = panels * lanes
    corners = [(top, left) for left in range(0, cols, width) for top in range(0, rows, height)]
    need((len(corners) > 1) == (several > 0), "number of blocks")
    words_in = [(len(source.data) - 4 * min(lanes, cols)) // 2]
    words_in = source.take(len(corners), "<u4") if several else words_in
    for (top, left), length in zip(corners, words_in, strict=True):
        right = min(left + width, cols)
        block = Lanes(source, min(lanes, right - left), length, tables)
        yield block, range(top, min(top + height, rows)), range(left, right), lanes
        need(not block.words.size and (block.x == 1 << 16).all(), "end of a block")
    need(not len(source.data), "bytes after a stream")


def rans(source, rows, cols, table, ids=None):
    ids, out = np.zeros(cols, int) if ids is None else ids, np.empty((rows, cols), "u1")
    for block, down, across, lanes in blocks(source, rows, cols, table):
        for left in across[::lanes]:
            panel = slice(left, min(left + lanes, across.stop))
            used = slice(panel.stop - left)
            for row in down:
                out[row, panel] = block.symbols(used, ids[panel])
                block.refill(used)
    return out


def integers(data, rows, cols):
    source = Source(data)
    if rows * cols == 0:
        need(not len(data), "bytes for no integers")
        return np.zeros((rows, cols), int)
    kind, low = source.byte(), unzigzag(source.varint())
    if kind == 1:
        need(not len(source.data), "bytes after a constant")
        return np.full((rows, cols), low)
    need(kind & ~12 == 2, "kind of integers")
    size, escape = source.byte() + 1, kind >> 3
    shape, order, ids, n = (1, rows * cols), np.arange(rows * cols), None, 1
    if not kind & 4:
        n, coded = source.byte() + 1, source.byte()
        if coded:
            table = models(source, 1, n)
            ids = rans(Source(source.take(source.varint()).astype("u1")), 1, cols, table)[0]
        else:
            ids = source.fixed(np.full(cols, (n - 1).bit_length()))
        need(coded < 2 and (ids < n).all(), "classes of columns")
        shape, order = (rows, cols), np.argsort(ids, kind="stable")
        ids = ids[order]
    table = models(source, n, size, low, escape)
    u = source.golomb(source.varint(), source.byte()) if escape else np.zeros(0, int)
    values = rans(source, *shape, table, ids) + np.int64(low)
    if escape:
        hidden, end = values == low + size - 1, low + size - 1
        need(hidden.sum() == u.size, "number of escapes")
        values[hidden] = np.where(u & 1, low - 1 - (u >> 1), end + (u >> 1))
    out = np.empty_like(values)
    out[:, order] = values
    return out.reshape(rows, cols)


def octets(data, n):
    source = Source(data)
    if n == 0 or data[0] == 0:
        need(len(data) == n + (n > 0), "length of stored bytes")
        return np.frombuffer(data, "u1")[-n:]
    kind, direct = source.byte(), source.byte() + 1
    if kind == 1:
        need(not len(source.data), "bytes after a constant")
        return np.full(n, direct - 1, "u1")
    need(kind & ~8 == 2, "kind of bytes")
    first = source.byte()
    values = first + np.cumsum(np.append(0, source.golomb(direct - 1, 0) + 1))
    need(values[-1] < 256, "a value above 255")
    table = models(source, 1, direct + (kind >> 3))
    escaped = source.take(source.varint()) if kind & 8 else np.zeros(0, int)
    symbols = rans(source, 1, n, table)[0]
    out = np.append(values, 0)[symbols].astype("u1")
    need((symbols == direct).sum() == escaped.size, "number of escapes")
    out[symbols == direct] = escaped
    return out


def sections(data, count):
    source = Source(data)
    first = [bytes(source.take(source.varint()).astype("u1")) for _ in range(count - 1)]
    return [*first, bytes(source.data)]


def sparse(matrix, data):
    """A matrix with outliers in their places."""
    head, high, low, *planes = sections(data, 5)
    head, low, size = Source(head), Source(low), matrix.size
    count = head.varint()
    need(not len(head.data) and count <= size, "number of outliers")
    width = min(max((size // max(count, 1)).bit_length() - 4, 0), 8)
    stream = np.unpackbits(low.take(-(-count * width // 8)).astype("u1"), bitorder="little")
    need(not len(low.data) and not stream[count * width :].any(), "distances of outliers")
    gaps = stream[: count * width].reshape(count, width) @ (1 << np.arange(width))
    gaps = (integers(high, count, 1)[:, 0] << width) + gaps.astype(int)
    places = np.cumsum(gaps + 1) - 1
    need((gaps >= 0).all() and (places < size).all(), "an outlier outside the matrix")
    values = np.stack([octets(p, count) for p in planes[::-1]], axis=1).astype("u1").view("<f2")
    need(np.isfinite(values).all(), "an outlier that is not finite")
    matrix.flat[places] = values.ravel()
    return matrix


def grid(data, count, limit):
    """Whole exponents of scales, or levels."""
    source, out = Source(data), np.zeros(count, int)
    if data:
        middle, kind = unzigzag(source.varint()), source.byte()
        need(kind in (*range(33), 255), "kind of scales")
        if kind == 255:
            out = middle + integers(source.data, count, 1)[:, 0]
        else:
            out = middle + unzigzag(source.golomb(count, kind))
            need(not len(source.data), "bytes after scales")
    need((abs(out) <= limit).all(), "a scale outside the grid")
    return out


def scales(exponent, per_octave):
    octave, rest = np.divmod(exponent, per_octave)
    fraction = np.array([2 ** (i / per_octave) for i in range(per_octave)], "f4")
    return np.ldexp(fraction[rest], octave)
