"""Secure aggregation: the server learns the sum of the nodes' vectors modulo 2^32, and no vector.

The protocol of Bonawitz et al. 2017 (ePrint 2017/281) against an active server, on the complete graph.
One attempt at a round has five legs; each is a request of the server and a reply of each node:

1. keys: two fresh X25519 keys and a commitment to the self-mask's seed, signed with the ledger key;
2. shares: Shamir shares of both secrets, encrypted for each peer;
3. masked input: the vector plus its self mask and one mask for each peer, which cancel in the sum;
4. survivors: a signature over who sent a masked input;
5. unmask: shares of the survivors' seeds, and of the mask secrets of those who dropped out.

Formal guarantees, for a cohort of n nodes with threshold t, of which at most c collude with the server
(t ≥ ⌈2n/3⌉ and 2t > n + c, which :class:`fedslm.secagg.cohort.Cohort` enforces):
    * The server and the c colluding nodes learn nothing about the other vectors but the sum, modulo
      2^32, over one set of at least t survivors, so of at least t − c honest ones. With fewer than t
      survivors they learn nothing. This holds if X25519, HKDF-SHA256, AES-256 and Ed25519 are secure.
    * An honest node signs one survivor set in an attempt, and never gives both shares of one peer.
    * A node that restarts in an attempt only repeats what it has sent: it draws no second noise.

Not guaranteed: that the sum is right. A hostile node can send any vector, and can make a round fail.

Only NumPy and ``cryptography`` are used, and no network: messages are bytes.
"""
