// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//go:build ignore

/* Gateway mode: a bump in the wire between two network cards. Takes the TCP
 * connections that are negotiated or encrypted for the hosts on the inner side to
 * the process, and forwards everything else from card to card.
 *
 *   outer wire -> gateway_outer -> AF_XDP -> process -> AF_XDP -> inner wire
 *   inner wire -> gateway_inner -> AF_XDP -> process -> AF_XDP -> outer wire
 *
 * The programs outlive the process if it does not end in order: what was encrypted
 * stays shut then.
 */
#include "divert.h"

enum side { OUTER, INNER, SIDES };

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, MAX_QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} outer_xsks SEC(".maps"), inner_xsks SEC(".maps");

/* The card of each side. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, SIDES);
	__type(key, __u32);
	__type(value, __u32);
} cards SEC(".maps");

/* For each side; the order is that of gatewayCounters in Go. */
enum counter {
	COUNT_FORWARDED,
	COUNT_LOCAL,
	COUNT_FLOW,
	COUNT_FLOW_NO_SOCKET,
	COUNT_FLOW_STALE,
	COUNT_SYN,
	COUNT_SYN_FORWARDED,
	COUNT_SYN_REFUSED,
	COUNT_FRAGMENT,
	COUNT_EXTENSION,
	COUNT_ICMP,
	COUNT_ICMP_DROPPED,
	COUNT_REUSED,
	COUNT_BLOCKED,
	COUNTER_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SIDES * COUNTER_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Set before loading: the address of each card, as loaded, and whether nothing is
 * to pass without the process. */
const volatile __u32 mac_high[SIDES];
const volatile __u16 mac_low[SIDES];
const volatile bool block;

static __always_inline int count(enum side from, __u32 counter, int action)
{
	__u32 key = from * COUNTER_MAX + counter;
	__u64 *value = bpf_map_lookup_elem(&counters, &key);

	if (value)
		*value += 1;
	return action;
}

static __always_inline int forward(enum side from, __u32 counter)
{
	return count(from, counter, bpf_redirect_map(&cards, from == OUTER ? INNER : OUTER, XDP_DROP));
}

static __always_inline int to_socket(struct xdp_md *ctx, enum side from)
{
	if (from == OUTER)
		return bpf_redirect_map(&outer_xsks, ctx->rx_queue_index, XDP_DROP);
	return bpf_redirect_map(&inner_xsks, ctx->rx_queue_index, XDP_DROP);
}

/* The sockets of a process that hangs are still there, those of one that died are
 * not. */
static __always_inline bool deserted(struct xdp_md *ctx, enum side from)
{
	__u32 queue = ctx->rx_queue_index;

	if (from == OUTER)
		return !bpf_map_lookup_elem(&outer_xsks, &queue);
	return !bpf_map_lookup_elem(&inner_xsks, &queue);
}

static __always_inline int listed(struct xdp_md *ctx, enum side from, const struct packet *p)
{
	int sent;

	if (stale()) {
		/* The host behind begins anew: what used these ports is over.
		 * Only that host can say so, and only of what no process has any
		 * more: one that hangs goes on with all that it has listed. */
		if (from != INNER || !is_syn(p->flags) || !deserted(ctx, from))
			return count(from, COUNT_FLOW_STALE, XDP_DROP);
		bpf_map_delete_elem(&flows, &p->key);
		if (verdict(&p->key) == VERDICT_REQUIRE)
			return count(from, COUNT_SYN_REFUSED, XDP_DROP);
		return forward(from, COUNT_REUSED);
	}
	sent = to_socket(ctx, from);
	return count(from, sent == XDP_REDIRECT ? COUNT_FLOW : COUNT_FLOW_NO_SOCKET, sent);
}

/* A SYN that is for the process. */
static __always_inline int opening(struct xdp_md *ctx, enum side from, const struct packet *p)
{
	if (!stale() && !(from == OUTER && control_value(CONTROL_SHED))) {
		int sent = to_socket(ctx, from);

		if (sent == XDP_REDIRECT)
			return count(from, COUNT_SYN, sent);
	}
	if (verdict(&p->key) == VERDICT_REQUIRE)
		return count(from, COUNT_SYN_REFUSED, XDP_DROP);
	return forward(from, COUNT_SYN_FORWARDED);
}

static __always_inline int translate(struct xdp_md *ctx, enum side from)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct packet p = {};
	struct pair_key pair;
	int kind;

	if ((void *)(eth + 1) <= end && *(__u32 *)&eth->h_dest[0] == mac_high[from] &&
	    *(__u16 *)&eth->h_dest[4] == mac_low[from])
		return count(from, COUNT_LOCAL, XDP_PASS);
	if (block && (stale() || deserted(ctx, from)))
		return count(from, COUNT_BLOCKED, XDP_DROP);
	kind = parse(data, end, from == INNER, &p);
	switch (kind) {
	case KIND_TCP:
		if (bpf_map_lookup_elem(&flows, &p.key))
			return listed(ctx, from, &p);
		if (!is_syn(p.flags))
			break;
		if (from == INNER ? control_value(CONTROL_ENABLED) && verdict(&p.key) != VERDICT_PLAIN
				  : concerns(ctx, &p, end - data))
			return opening(ctx, from, &p);
		break;
	case KIND_TCP_FRAGMENT:
	case KIND_EXTENSION:
		pair = pair_of(&p.key);
		if (bpf_map_lookup_elem(&pairs, &pair))
			return count(from, kind == KIND_EXTENSION ? COUNT_EXTENSION : COUNT_FRAGMENT, XDP_DROP);
		break;
	case KIND_ICMP_ERROR:
		if (!bpf_map_lookup_elem(&flows, &p.key))
			break;
		/* Outwards it would carry plaintext. */
		if (from == INNER || stale() || to_socket(ctx, from) != XDP_REDIRECT)
			return count(from, COUNT_ICMP_DROPPED, XDP_DROP);
		return count(from, COUNT_ICMP, XDP_REDIRECT);
	}
	return forward(from, COUNT_FORWARDED);
}

SEC("xdp")
int gateway_outer(struct xdp_md *ctx)
{
	return translate(ctx, OUTER);
}

SEC("xdp")
int gateway_inner(struct xdp_md *ctx)
{
	return translate(ctx, INNER);
}

/* For an MTU above what fits one buffer of the driver. */
SEC("xdp.frags")
int gateway_outer_frags(struct xdp_md *ctx)
{
	return translate(ctx, OUTER);
}

SEC("xdp.frags")
int gateway_inner_frags(struct xdp_md *ctx)
{
	return translate(ctx, INNER);
}

char _license[] SEC("license") = "GPL";
