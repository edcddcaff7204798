"""Secure aggregation: the server learns the sum of what clients send, and nothing else about any of them.

A pure core, from bytes to bytes: `client` and `server` hold the five phases, `simulation` runs them in one process.
An input of integers modulo 2^w travels as x + PRG(b) ± Σ PRG(s_j): b is the client's own mask, s_j one that it shares
with neighbour j and that cancels in the sum. Both can be rebuilt from shares that other clients hold, so that the sum
opens although some fall silent; of one client the holders give out the one or the other, never both.

    phase  client sends                                          server answers
    0      two public keys, signed                               the roster of all keys
    1      shares of both secrets, sealed for each holder        the shares that are for it, and who shared
    2      the masked input, and a signature on who shared       who survived
    3      a signature on who survived                           the signatures, and whose secrets to open
    4      for each client one share: of b, or of its mask key   (opens the sum)

What is promised. To a server that keeps to the protocol: the sum of the survivors, if as many as the threshold are
left. To one that does not, with node keys: it learns nothing but sums over sets of clients that each reach as far as
`graph.exposure_bits` says, as long as no more clients collude with it than `Policy.colluding`; clients refuse whatever
would show more (`RefusalError`). Without node keys (`keys.OPEN`) the server could play every other client, so that
serves simulations alone.

What is not promised. Nothing is hidden that the sum itself tells, so a cohort is large or noise is added before
(`discrete_gaussian`). A client can spoil a round, or add what it likes to a sum. Python's integers take a time that
depends on their values, which somebody who measures a node's processor could read.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", figure 4 with
its additions against active adversaries; the neighbour graph from Bell et al. 2020, "Secure Single-Server Aggregation
with (Poly)Logarithmic Overhead". Three additions: every secret is bound to the roster; a client signs who shared
along with its masked input, and no holder goes on unless all whose shares it holds saw the same; and the input ends
in words that sum to the number of survivors, so that a sum which a wrong share has spoilt is not taken for one.
"""
