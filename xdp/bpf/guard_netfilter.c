// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//go:build ignore

/* The guard at the IP layer of one network namespace: what has no socket (any
 * more), and ICMP errors, which no socket filter sees. It is attached behind
 * reassembly. */
#include "packet.h"

#define GUARD_SOURCE struct bpf_dynptr *
#define load(source, at, to, length) bpf_dynptr_read(to, length, source, at, 0)
#include "guard.h"

#define NF_DROP 0
#define NF_ACCEPT 1

/* Of the kernel; the loader finds the offsets. */
struct sk_buff {
	__u16 tc_index;
} __attribute__((preserve_access_index));

struct net_device {
	int ifindex;
} __attribute__((preserve_access_index));

struct nf_hook_state {
	struct net_device *out;
} __attribute__((preserve_access_index));

struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
} __attribute__((preserve_access_index));

extern int bpf_dynptr_from_skb(struct __sk_buff *skb, __u64 flags, struct bpf_dynptr *dynptr) __ksym;

static __always_inline enum listed judge(struct bpf_nf_ctx *ctx, bool outbound)
{
	struct packet p = {};
	struct bpf_dynptr packet;
	__u8 version;
	int kind = KIND_OTHER;

	if (bpf_dynptr_from_skb((struct __sk_buff *)ctx->skb, 0, &packet) || load(&packet, 0, &version, 1))
		return UNLISTED;
	if (version >> 4 == 4)
		kind = walk_v4(&packet, 0, &p, outbound);
	else if (version >> 4 == 6)
		kind = walk_v6(&packet, 0, &p, outbound);
	return look_up(&p, kind, outbound);
}

SEC("netfilter")
int guard_local_in(struct bpf_nf_ctx *ctx)
{
	if (!listing() || is_passed(ctx->skb->tc_index))
		return NF_ACCEPT;
	switch (judge(ctx, false)) {
	case LISTED_FLOW:
		count(NETFILTER_IN_COUNT_FLOW);
		return NF_DROP;
	case LISTED_FRAGMENT:
		count(NETFILTER_IN_COUNT_FRAGMENT);
		return NF_DROP;
	case LISTED_ICMP:
		count(NETFILTER_IN_COUNT_ICMP);
		return NF_DROP;
	default:
		return NF_ACCEPT;
	}
}

SEC("netfilter")
int guard_postrouting(struct bpf_nf_ctx *ctx)
{
	__u32 device;

	if (!listing())
		return NF_ACCEPT;
	device = ctx->state->out->ifindex;
	if (bpf_map_lookup_elem(&guard_exits, &device))
		return NF_ACCEPT;
	switch (judge(ctx, true)) {
	case LISTED_FLOW:
		count(NETFILTER_OUT_COUNT_FLOW);
		return NF_DROP;
	case LISTED_FRAGMENT:
		count(NETFILTER_OUT_COUNT_FRAGMENT);
		return NF_DROP;
	case LISTED_ICMP: /* it quotes what was injected */
		count(NETFILTER_OUT_COUNT_ICMP);
		return NF_DROP;
	default:
		return NF_ACCEPT;
	}
}

char _license[] SEC("license") = "GPL";
