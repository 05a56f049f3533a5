// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//go:build ignore

/* The guard: keeps listed connections shut except for what the process
 * injects, refuses new ones that must not be plain, and outlives the process.
 * The filters stay on the interface until they are removed, and run behind the
 * programs that divert. */
#include "policy.h"

#define GUARD_SOURCE struct __sk_buff *
#define load(skb, at, to, length) bpf_skb_load_bytes(skb, at, to, length)
#include "guard.h"

#define MAX_TAGS 4
#define DEFAULT_TTL 64

/* Set before loading: the mark of injected packets, never 0. With the process
 * gone nobody sets it. */
const volatile __u32 mark;
const volatile bool refusing; /* the policy requires encryption of some connections */

/* walk finds TCP behind what the plain parser stops at, several tags and the
 * extension headers of IPv6: the stack gets past them, so they must not hide a
 * segment. What cannot be followed to its end counts as a fragment and is
 * judged by its addresses. */
static __noinline int walk(struct __sk_buff *skb, struct packet *p, bool outbound)
{
	__u32 at = ETH_HLEN - 2;
	__be16 proto;

	if (!p)
		return KIND_OTHER;
	for (int i = 0; i <= MAX_TAGS; i++) {
		if (bpf_skb_load_bytes(skb, at, &proto, sizeof(proto)))
			return KIND_OTHER;
		switch (proto) {
		case bpf_htons(ETH_P_IP):
			return walk_v4(skb, at + 2, p, outbound);
		case bpf_htons(ETH_P_IPV6):
			return walk_v6(skb, at + 2, p, outbound);
		case bpf_htons(ETH_P_8021Q):
		case bpf_htons(ETH_P_8021AD):
			at += 4;
			break;
		default:
			return KIND_OTHER;
		}
	}
	return KIND_OTHER;
}

/* *whole tells that nothing wraps the segment. */
static __always_inline enum listed judge(struct __sk_buff *skb, struct packet *p, bool outbound, bool *whole)
{
	int kind = parse_skb(skb, p, outbound);
	enum listed listed;

	*whole = kind == KIND_TCP;
	if (kind == KIND_EXTENSION || kind == KIND_STACKED) {
		p->tcp = 0;
		kind = walk(skb, p, outbound);
	}
	listed = look_up(p, kind, outbound);
	if (listed == UNLISTED && kind == KIND_TCP && is_syn(p->flags) && verdict(&p->key) == VERDICT_REQUIRE)
		return REFUSED;
	return listed;
}

struct tcp_reset {
	__be16 sport, dport;
	__be32 seq, ack;
	__u8 offset, flags;
	__be16 window;
	__sum16 check;
	__be16 urgent;
};

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* A buffer whose checksum the card completes has to hold the sum of the
 * pseudo-header, any other the whole checksum. Which one this is only the kernel
 * knows: it takes what is added to the field for the first kind as done. */
static __always_inline int set_checksum(struct __sk_buff *skb, const struct packet *p, const struct tcp_reset *r)
{
	__u32 at = p->tcp + offsetof(struct tcp_reset, check);
	__be32 pseudo[10] = {};
	__u16 partial;
	__s64 sum;

	__builtin_memcpy(pseudo, p->key.local, 16);
	__builtin_memcpy(pseudo + 4, p->key.remote, 16);
	if (p->v4) /* as mapped addresses have them */
		pseudo[2] = pseudo[6] = 0;
	pseudo[8] = bpf_htonl(TCP_HEADER);
	pseudo[9] = bpf_htonl(IPPROTO_TCP);
	sum = bpf_csum_diff(0, 0, pseudo, sizeof(pseudo), 0);
	if (sum < 0)
		return -1;
	partial = fold(sum);
	sum = bpf_csum_diff(0, 0, (__be32 *)r, sizeof(*r), 0);
	if (sum < 0 || bpf_skb_store_bytes(skb, at, &partial, sizeof(partial), 0))
		return -1;
	/* The kernel subtracts the field before it complements the rest. */
	return bpf_l4_csum_replace(skb, at, 0, fold(sum + 2 * (__u64)partial), 0);
}

static __always_inline int set_ip4(struct __sk_buff *skb, const struct packet *p, bool outbound)
{
	__be16 length = bpf_htons(p->tcp - p->l3 + TCP_HEADER), old_length, old_ttl, ttl;

	if (bpf_skb_load_bytes(skb, p->l3 + 2, &old_length, 2) || bpf_skb_load_bytes(skb, p->l3 + 8, &old_ttl, 2))
		return -1;
	ttl = bpf_htons(DEFAULT_TTL << 8 | (bpf_ntohs(old_ttl) & 0xff));
	return bpf_l3_csum_replace(skb, p->l3 + 10, old_length, length, 2) ||
	       bpf_l3_csum_replace(skb, p->l3 + 10, old_ttl, ttl, 2) ||
	       bpf_skb_store_bytes(skb, p->l3 + 2, &length, 2, 0) || bpf_skb_store_bytes(skb, p->l3 + 8, &ttl, 2, 0) ||
	       bpf_skb_store_bytes(skb, p->l3 + 12, outbound ? &p->key.remote[3] : &p->key.local[3], 4, 0) ||
	       bpf_skb_store_bytes(skb, p->l3 + 16, outbound ? &p->key.local[3] : &p->key.remote[3], 4, 0);
}

static __always_inline int set_ip6(struct __sk_buff *skb, const struct packet *p, bool outbound)
{
	__be16 length = bpf_htons(TCP_HEADER);
	__u8 hops = DEFAULT_TTL;

	return bpf_skb_store_bytes(skb, p->l3 + 4, &length, 2, 0) || bpf_skb_store_bytes(skb, p->l3 + 7, &hops, 1, 0) ||
	       bpf_skb_store_bytes(skb, p->l3 + 8, outbound ? p->key.remote : p->key.local, 16, 0) ||
	       bpf_skb_store_bytes(skb, p->l3 + 24, outbound ? p->key.local : p->key.remote, 16, 0);
}

/* refuse turns a SYN into the reset that answers it and sends it back to where
 * it came from, so that connect fails at once. What cannot be turned is dropped,
 * and times out. */
static __always_inline int refuse(struct __sk_buff *skb, struct packet *p, bool outbound)
{
	struct tcp_reset t, r = {.offset = TCP_HEADER / 4 << 4, .flags = TCP_RST | TCP_ACK};
	__u8 macs[2 * ETH_ALEN], swapped[2 * ETH_ALEN];

	if (!p->tcp || /* behind extension headers */
	    bpf_skb_load_bytes(skb, p->tcp, &t, sizeof(t)) || bpf_skb_load_bytes(skb, 0, macs, sizeof(macs)))
		return TC_ACT_SHOT;
	__builtin_memcpy(swapped, macs + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(swapped + ETH_ALEN, macs, ETH_ALEN);
	r.sport = t.dport;
	r.dport = t.sport;
	r.ack = bpf_htonl(bpf_ntohl(t.seq) + 1);
	if (bpf_skb_change_tail(skb, p->tcp + TCP_HEADER, 0) ||
	    bpf_skb_store_bytes(skb, 0, swapped, sizeof(swapped), 0) ||
	    bpf_skb_store_bytes(skb, p->tcp, &r, sizeof(r), 0) || set_checksum(skb, p, &r) ||
	    (p->v4 ? set_ip4(skb, p, outbound) : set_ip6(skb, p, outbound)))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, outbound ? BPF_F_INGRESS : 0);
}

SEC("tc")
int guard_ingress(struct __sk_buff *skb)
{
	struct packet p = {};
	bool whole;

	if (skb->mark == mark) {
		/* It has served: routing rules and other programs shall not
		 * see it, and it shall not get into another interface. */
		skb->mark = 0;
		skb->tc_index = tag;
		count(INGRESS_COUNT_INJECTED);
		return TC_ACT_UNSPEC;
	}
	if (!refusing && !listing())
		return TC_ACT_UNSPEC;
	switch (judge(skb, &p, false, &whole)) {
	case REFUSED:
		count(INGRESS_COUNT_REFUSED);
		return refuse(skb, &p, false);
	case LISTED_FLOW:
		count(INGRESS_COUNT_FLOW);
		return TC_ACT_SHOT;
	case LISTED_FRAGMENT:
		count(INGRESS_COUNT_FRAGMENT);
		return TC_ACT_SHOT;
	case LISTED_ICMP: /* it could shrink the segment size, or end the connection */
		count(INGRESS_COUNT_ICMP);
		return TC_ACT_SHOT;
	case UNLISTED:
		/* Not what may be unwrapped later: that would inherit it. */
		if (whole && !skb->tc_index)
			skb->tc_index = tag | TAG_JUDGED;
		break;
	}
	return TC_ACT_UNSPEC;
}

/* What belongs to the diverter was redirected before it came here. */
SEC("tc")
int guard_egress(struct __sk_buff *skb)
{
	struct packet p = {};
	bool whole;

	if (skb->tc_index == tag) { /* forwarded instead of received */
		count(EGRESS_COUNT_INJECTED);
		return TC_ACT_SHOT;
	}
	if (!refusing && !listing())
		return TC_ACT_UNSPEC;
	switch (judge(skb, &p, true, &whole)) {
	case REFUSED:
		count(EGRESS_COUNT_REFUSED);
		return refuse(skb, &p, true);
	case LISTED_FLOW:
		count(EGRESS_COUNT_FLOW);
		return TC_ACT_SHOT;
	case LISTED_FRAGMENT:
		count(EGRESS_COUNT_FRAGMENT);
		return TC_ACT_SHOT;
	case LISTED_ICMP: /* it quotes what was injected */
		count(EGRESS_COUNT_ICMP);
		return TC_ACT_SHOT;
	case UNLISTED:
		break;
	}
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "GPL";
