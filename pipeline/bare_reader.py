import json

import numpy as np
import pyarrow as pa


def words(seed, sequence_id, position, draw, block):  # Philox4x32-10: block j has the words of entries 4j .. 4j+3
    low = 0xFFFFFFFF
    c = [block, np.full_like(block, position + draw * 2**24), np.full_like(block, sequence_id & low), np.full_like(block, sequence_id >> 32)]
    k = [seed & low, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return np.stack(c, 1).reshape(-1)


def exponential(word):
    v = (word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return -np.log1p(-np.minimum(v, np.float32(1 - 2.0**-24)).astype(np.float64))


def noise(table, row, t, draw=0):  # g of every vocabulary entry at one position of one row, float64 [V]
    about = json.loads(table.schema.metadata[b"gumbel"])
    seed, vocab_size = int(about["seed"]), about["vocab_size"]
    one = {name: table.column(name)[row].as_py() for name in table.column_names}
    e = exponential(words(seed, one["sequence_id"], t, draw, np.arange(-(-vocab_size // 4), dtype=np.uint64))[:vocab_size])
    e0 = exponential(words(seed, one["sequence_id"], t, draw, np.array([0xFFFFFFFF], dtype=np.uint64)))[0]
    g = -np.log(e)
    if about["extraction"] == "parallel":
        at = slice(sum(one["kept"][:t]), sum(one["kept"][: t + 1]))
        index = one["index"][at] if "index" in one else [entry >> 8 for entry in one["entry"][at]]
        code = one["code"][at] if "code" in one else [entry & 255 for entry in one["entry"][at]]
        g[index] = -np.log(e[index] + np.exp(-about["step"] * np.array(code, float)) * e0)
        g[one["input_ids"][t]] = -one["log_prob"][t] - np.log(e0)
    return g


def shard(path):
    return pa.ipc.open_file(pa.memory_map(path)).read_all()
