"""Checks of lesson 10. Oracles: counting everything anew, all token sequences enumerated, loops over plain numbers."""

import collections
import itertools
import random
import re
from types import SimpleNamespace

import torch

import nano_tok
from lessons.checks import close, exercise, need

# One paragraph, written for this lesson, in eight languages.
PARALLEL = {
    "English": "Every morning the old woman opens the window and looks at the sea. She drinks a cup of tea and reads the "
    "newspaper. Then she goes to the market and buys bread, fish and apples. In the evening her grandchildren come and "
    "she tells them a story.",
    "German": "Jeden Morgen öffnet die alte Frau das Fenster und schaut auf das Meer. Sie trinkt eine Tasse Tee und liest die "
    "Zeitung. Dann geht sie auf den Markt und kauft Brot, Fisch und Äpfel. Am Abend kommen ihre Enkel und sie erzählt "
    "ihnen eine Geschichte.",
    "French": "Chaque matin, la vieille femme ouvre la fenêtre et regarde la mer. Elle boit une tasse de thé et lit le journal. "
    "Puis elle va au marché et achète du pain, du poisson et des pommes. Le soir, ses petits-enfants viennent et elle leur "
    "raconte une histoire.",
    "Spanish": "Cada mañana la anciana abre la ventana y mira el mar. Bebe una taza de té y lee el periódico. Luego va al "
    "mercado y compra pan, pescado y manzanas. Por la tarde vienen sus nietos y ella les cuenta una historia.",
    "Russian": "Каждое утро старая женщина открывает окно и смотрит на море. Она пьёт чашку чая и читает газету. Потом она "
    "идёт на рынок и покупает хлеб, рыбу и яблоки. Вечером приходят её внуки, и она рассказывает им сказку.",
    "Greek": "Κάθε πρωί η γριά γυναίκα ανοίγει το παράθυρο και κοιτάζει τη θάλασσα. Πίνει ένα φλιτζάνι τσάι και διαβάζει την "
    "εφημερίδα. Μετά πηγαίνει στην αγορά και αγοράζει ψωμί, ψάρια και μήλα. Το βράδυ έρχονται τα εγγόνια της και τους λέει "
    "μια ιστορία.",
    "Hindi": "हर सुबह बूढ़ी औरत खिड़की खोलती है और समुद्र को देखती है। वह एक कप चाय पीती है और अख़बार पढ़ती है। फिर वह बाज़ार जाती है और रोटी, "
    "मछली और सेब ख़रीदती है। शाम को उसके पोते-पोतियाँ आते हैं और वह उन्हें एक कहानी सुनाती है।",
    "Chinese": "每天早上，老太太打开窗户，看着大海。她喝一杯茶，读报纸。然后她去市场买面包、鱼和苹果。晚上，她的孙子孙女来了，她给他们讲一个故事。",
}


def random_text(seed, size):
    return bytes(random.Random(seed).choices((b"a", b"ab ", b"aab \n\n  1a", b"abcd ")[seed % 4], k=size))


def replace(ids, pair, new):
    """[1, 2, 3, 1, 2], (1, 2), 4 -> [4, 3, 4], by index."""
    out, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == tuple(pair)
        out.append(new if found else ids[i])
        i += 2 if found else 1
    return out


def count_pairs(chunks):
    """List of lists -> Counter of neighbouring pairs."""
    counts = collections.Counter()
    for ids in chunks:
        for i in range(1, len(ids)):
            counts[ids[i - 1], ids[i]] += 1
    return counts


def merges_of(text, vocab):
    """Byte pair encoding by its definition, every chunk of the text counted anew before every merge."""
    chunks, merges = [list(chunk) for chunk in re.findall(nano_tok.CHUNKS, text)], []
    for new in range(256, vocab):
        order = sorted((-n, pair) for pair, n in count_pairs(chunks).items())
        if not order or order[0][0] > -2:
            break
        merges.append(order[0][1])
        chunks = [replace(ids, merges[-1], new) for ids in chunks]
    return merges


def apply_merges(chunk, merges):
    """All merges, in the order of training, each over the whole chunk."""
    ids = list(chunk)
    for i, pair in enumerate(merges):
        ids = replace(ids, pair, 256 + i)
    return ids


@exercise(
    ("pairs across the borders of chunks", "[list(chunk) for chunk in re.findall(nano_tok.CHUNKS, text)]", "[list(text)]"),
    ("of equal pairs the largest", "(-counts[pair], pair)", "(-counts[pair], -pair[0], -pair[1])"),
    ("of equal pairs the first in the text", "(-counts[pair], pair)", "-counts[pair]"),
    ("the rarest pair", "(-counts[pair], pair)", "(counts[pair], pair)"),
    ("goes on with pairs that occur once", "counts[best] < 2", "counts[best] < 1"),
    ("every chunk counted once, however often it occurs", "re.findall(nano_tok.CHUNKS, text)]",
     "sorted(set(re.findall(nano_tok.CHUNKS, text)))]"),
    ("one merge too many", "len(merges) < vocab - 256", "len(merges) <= vocab - 256"),
    ("counted once, never again", "counts = Counter(", "counts = Counter() if merges else Counter("),
    ("all merges make one token", "256 + len(merges)", "256"),
)
def check_learn(learn):
    need(learn(b"aaabdaaabac", 257) == [(97, 97)], f"aaabdaaabac, one merge: {learn(b'aaabdaaabac', 257)}")
    need(learn(b"abcd", 300) == [], "in abcd no pair occurs twice: there is nothing to merge")
    need(learn(b"", 300) == [] and learn(b"aa", 256) == [], "no text, or no place in the vocabulary: no merges")
    for seed, size, vocab in ((0, 7, 300), (1, 60, 258), (1, 200, 275), (2, 400, 280), (3, 300, 290), (6, 900, 300)):
        text = random_text(seed, size)
        ours, truth = [tuple(pair) for pair in learn(text, vocab)], merges_of(text, vocab)
        if ours != truth:
            i = next((i for i, (a, b) in enumerate(zip(ours, truth)) if a != b), min(len(ours), len(truth)))
            need(False, f"{text[:30]!r}..., vocabulary of {vocab}: merge {i} is {ours[i:i + 1]}, wanted {truth[i:i + 1]}")


@exercise(
    ("weight forgotten when pairs leave", "counts[left] -= weight", "counts[left] -= 1"),
    ("weight forgotten when pairs come", "counts[right] += weight", "counts[right] += 1"),
    ("old pairs stay", "counts[left] -= weight", "counts[left] -= 0"),
    ("no new pairs", "counts[right] += weight", "counts[right] += 0"),
    ("the merged pair alone leaves", "for left in zip(ids, ids[1:]):", "for left in [p for p in zip(ids, ids[1:]) if p == pair]:"),
    ("counts right, chunk unchanged", "return merged", "return ids"),
    ("merged from the right", "nano_tok.merge(ids, pair, new)", "nano_tok.merge(ids[::-1], pair[::-1], new)[::-1]"),
    ("every token once", "zip(merged, merged[1:])", "set(zip(merged, merged[1:]))"),
)
def check_update(update):
    counts = collections.Counter({(1, 2): 6, (2, 3): 3, (3, 1): 3})
    need(list(update(counts, [1, 2, 3, 1, 2], (1, 2), 4, 3)) == [4, 3, 4], "the chunk 1 2 3 1 2 must become 4 3 4")
    need(+counts == {(4, 3): 3, (3, 4): 3}, f"after the chunk 1 2 3 1 2 of weight 3: {dict(+counts)}")
    rng = random.Random(0)
    for size in (0, 1, 2, 3, 7, 30):
        for kinds in (1, 2, 4):
            others = [[rng.randrange(kinds) for _ in range(9)]]
            ids, weight = [rng.randrange(kinds) for _ in range(size)], rng.randrange(1, 4)
            pair = (rng.randrange(kinds), rng.randrange(kinds))
            counts = count_pairs(others + [ids] * weight)
            ours, truth = update(counts, list(ids), pair, 9, weight), replace(ids, pair, 9)
            need(list(ours) == truth, f"{ids}, {pair} -> 9: {ours}, wanted {truth}")
            need(+counts == count_pairs(others + [truth] * weight) and min(counts.values(), default=0) >= 0,
                 f"{ids} of weight {weight}, {pair} -> 9: the counts are not those of a new count")


@exercise(
    ("| in the name is a sign of the pattern", "re.escape(name)", "name"),
    ("of two names the shorter", "key=len, reverse=True", "key=len"),
    ("never refused", "if found and not allow:", "if False:"),
    ("always refused", "if found and not allow:", "if found:"),
    ("taken as plain text", "[special[piece]] if piece in special", "bpe.encode(piece) if piece in special"),
    ("left out", "[special[piece]] if piece in special", "[] if piece in special"),
    ("the text between is forgotten", "else bpe.encode(piece)", "else []"),
)
def check_encode_special(encode_special):
    bpe = nano_tok.BPE([(97, 98), (256, 256)])
    names = {b"<|end|>": 258, b"<|end|>>": 259, b"a+": 260}

    def run(text, allow):
        try:
            return encode_special(bpe, text, names, allow)
        except ValueError:
            return "ValueError"

    for text in (b"", b"abab c", b"end | a", b"<|end|"):
        for allow in (False, True):
            need(run(text, allow) == bpe.encode(text), f"{text!r} holds no special token: encode it as always")
    for text, truth in ((b"<|end|>", [258]), (b"abab<|end|>ab", [257, 258, 256]), (b"<|end|>><|end|>", [259, 258]),
                        (b"ab a+ab<|end|>aa", [256, 32, 260, 256, 258, 97, 97])):
        ours = run(text, True)
        need(ours == truth, f"{text!r}: {ours}, wanted {truth}")
        need(run(text, False) == "ValueError", f"{text!r} holds a special token: raise ValueError unless allow is True")


@exercise(
    ("no hinge: pairs that lose are rewarded", ".clamp(min=0)", ""),
    ("the sign", "n - n[chosen]", "n[chosen] - n"),
    ("all shares equal", "n = counts @ w", "n = counts.mean(1)"),
    ("only the worst pair", ".clamp(min=0).sum()", ".clamp(min=0).max()"),
    ("number of pairs, not how much", ".clamp(min=0).sum()", ".gt(0).sum()"),
    ("source by source", "n = counts @ w", "n = counts * w; n = n.max(1).values"),
    ("mean", ".clamp(min=0).sum()", ".clamp(min=0).mean()"),
)
def check_violation(violation):
    worked = torch.tensor([[0.5, 0.1], [0.2, 0.9]])
    close(violation(torch.tensor([0.5, 0.5]), worked, 0), 0.25, "the worked example")
    close(violation(torch.tensor([0.5, 0.5]), worked, 1), 0.0, "the chosen pair is the most frequent one: nothing is violated")
    for P, K in ((1, 1), (4, 2), (7, 3), (50, 5)):
        rng = torch.Generator().manual_seed(P)
        counts, w = torch.rand(P, K, generator=rng), torch.rand(K, generator=rng).softmax(0)
        chosen, truth = P // 2, 0.0
        for p in range(P):
            more = sum((counts[p, k].item() - counts[chosen, k].item()) * w[k].item() for k in range(K))
            truth += max(more, 0.0)
        close(violation(w, counts, chosen), truth, f"{P} pairs, {K} sources")
    w = torch.tensor([0.5, 0.5], requires_grad=True)
    loss = violation(w, worked, 0)
    need(torch.is_tensor(loss) and loss.requires_grad, "the shares need a gradient: stay with tensors")


def chain(again=0.7, after_b=0.4):
    """Letters A, B, a Markov chain, in tokens A, B, AA: its exact law of the next token. A lone A is followed by B."""
    def law(tokens):
        a = again if tokens and tokens[-1] == 2 else after_b
        return [0.0, 1.0, 0.0] if tokens and tokens[-1] == 0 else [a * (1 - again), 1 - a, a * again]

    return law, [b"A", b"B", b"AA"]


def letters(text, again=0.7, after_b=0.4):
    """Probability of the letters themselves."""
    p, last = 1.0, "B"
    for letter in text.decode():
        a = again if last == "A" else after_b
        p, last = p * (a if letter == "A" else 1 - a), letter
    return p


def random_law(V, seed):
    """A law of the next token that depends on all tokens before."""
    def law(tokens):
        rng = random.Random(f"{seed} {list(tokens)}")
        p = [rng.random() ** 2 for _ in range(V)]
        return [x / sum(p) for x in p]

    return law


def enumerated(law, words, text):
    """All sequences of len(text) tokens: add up those that begin with the text."""
    total = 0.0
    for tokens in itertools.product(range(len(words)), repeat=len(text)):
        if b"".join(words[t] for t in tokens).startswith(text):
            p = 1.0
            for i, t in enumerate(tokens):
                p *= law(list(tokens[:i]))[t]
            total += p
    return total


@exercise(
    ("tokens that reach beyond the text are left out", "if word.startswith(text):", "if word == text:"),
    ("the first byte is enough for the last token", "word.startswith(text)", "word.startswith(text[:1])"),
    ("the law forgets what was read", "tokens + [t]", "[t]"),
    ("no law of what follows", "p[t] * covers", "covers"),
    ("the best cover alone", "total += p[t] * covers(law, words, text[len(word):], tokens + [t])",
     "total = max(total, p[t] * covers(law, words, text[len(word):], tokens + [t]))"),
    ("only the first byte of a token is compared", "elif text.startswith(word):", "elif text[:1] == word[:1]:"),
    ("any token may come next", "elif text.startswith(word):", "else:"),
    ("one byte is read, however long the token", "text[len(word):]", "text[1:]"),
)
def check_covers(covers):
    close(covers(*chain(), b""), 1.0, "every text begins with the empty one")
    for n in (1, 2, 5, 7):
        for text in map(bytes, itertools.product(b"AB", repeat=n)):
            close(covers(*chain(), text), letters(text), f"the chain, text {text.decode()}", 1e-12)
    for seed, words in enumerate(([b"a"], [b"a", b"b", b"ab"], [b"a", b"b", b"aa", b"ab", b"aba"], [b"x", b"abx", b"ab", b"a", b"bx"])):
        law = random_law(len(words), seed)
        for text in (b"a", b"ab", b"abx", b"abab", b"aaba"):
            close(covers(law, words, text), enumerated(law, words, text), f"tokens {words}, text {text}", 1e-12)


@exercise(
    ("entries out of date are used", "if (ids[i], ids[j]) != pair:", "if ids[i] is None or ids[j] is None:"),
    ("the newest merge first", "heapq.heappush(heap, (bpe.rank[pair], i, pair))", "heapq.heappush(heap, (-bpe.rank[pair], i, pair))"),
    ("from the right", "heapq.heappush(heap, (bpe.rank[pair], i, pair))", "heapq.heappush(heap, (bpe.rank[pair], -i, pair))"),
    ("the pair with the left neighbour is forgotten", "offer(before[i])", "pass"),
    ("the pair with the right neighbour is forgotten", "offer(i)  # the new token and its right neighbour", "pass"),
    ("the place behind still points at what is gone", "before[after[j]] = i", "pass"),
    ("the merged place is not skipped", "after[i] = after[j]", "pass"),
    ("the number of the merge, not of the token", "256 + bpe.rank[pair]", "bpe.rank[pair]"),
)
def check_encode_chunk(encode_chunk):
    def direct(merges):
        return SimpleNamespace(rank={pair: i for i, pair in enumerate(merges)}, known={})

    def run(bpe, chunk):
        try:
            return list(encode_chunk(bpe, chunk))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            need(False, f"{chunk[:20]!r}: {type(error).__name__}: {error}")

    for chunk in (b"", b"a", b"ab", b"ba", b"aab"):
        ours, truth = run(direct([(97, 98)]), chunk), apply_merges(chunk, [(97, 98)])
        need(ours == truth, f"{chunk!r} with one merge, ab: {ours}, wanted {truth}")
    for seed in range(8):
        merges = merges_of(random_text(seed, 500), 285)
        bpe = direct(merges)
        for size in (3, 10, 37, 300):
            for chunk in (random_text(seed + 100, size), random_text(seed + 1, size), b"a" * size):
                ours, truth = run(bpe, chunk), apply_merges(chunk, merges)
                need(ours == truth, f"{chunk[:20]!r}: {ours[:12]}, wanted {truth[:12]}")
