// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What the layers of the guard share: the connections that are kept shut, the
 * search for TCP in a packet however it is wrapped, and counters. Each object
 * that includes this is loaded with the maps of the first one.
 *
 * An object defines GUARD_SOURCE, the packet, and load(), which copies bytes of
 * it and returns 0 if they are there, before it includes this. */
#ifndef TCPCRYPT_GUARD_H
#define TCPCRYPT_GUARD_H

#include "packet.h"

#define MAX_FLOWS 262144
#define MAX_EXITS 1024
#define MAX_EXTENSIONS 8

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow_key); /* vlan is 0: a socket takes packets of its
				       * addresses and ports from any VLAN */
	__type(value, __u32);
} guard_flows SEC(".maps");

/* Address pairs that have listed flows; user space counts them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct pair_key);
	__type(value, __u32);
} guard_pairs SEC(".maps");

/* Whether any connection is listed. User space sets it before it lists the first
 * and clears it after the last: while nothing is listed, plain packets cost each
 * layer this one look. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} guard_listing SEC(".maps");

static __always_inline bool listing(void)
{
	__u32 zero = 0, *value = bpf_map_lookup_elem(&guard_listing, &zero);

	return !value || *value;
}

/* The devices behind which the diverter, or else guard_egress, sees what leaves. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_EXITS);
	__type(key, __u32);
	__type(value, __u32);
} guard_exits SEC(".maps");

/* The order is that of guardCounters in Go. */
enum counter {
	INGRESS_COUNT_INJECTED,
	INGRESS_COUNT_FLOW,
	INGRESS_COUNT_FRAGMENT,
	INGRESS_COUNT_ICMP,
	INGRESS_COUNT_REFUSED,
	EGRESS_COUNT_FLOW,
	EGRESS_COUNT_FRAGMENT,
	EGRESS_COUNT_ICMP,
	EGRESS_COUNT_INJECTED,
	EGRESS_COUNT_REFUSED,
	NETFILTER_IN_COUNT_FLOW,
	NETFILTER_IN_COUNT_FRAGMENT,
	NETFILTER_IN_COUNT_ICMP,
	NETFILTER_OUT_COUNT_FLOW,
	NETFILTER_OUT_COUNT_FRAGMENT,
	NETFILTER_OUT_COUNT_ICMP,
	CGROUP_IN_COUNT_FLOW,
	CGROUP_IN_COUNT_FRAGMENT,
	CGROUP_OUT_COUNT_FLOW,
	CGROUP_OUT_COUNT_FRAGMENT,
	COUNTER_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTER_MAX);
	__type(key, __u32);
	__type(value, __u64);
} guard_counters SEC(".maps");

/* Set before loading, even and never 0: skb->tc_index of what the process
 * injected, from the card's ingress on, and with the lowest bit that of segments
 * which were judged there and are not listed. No socket option, routing rule or
 * firewall can set or see it, unlike the mark. */
const volatile __u16 tag;

#define TAG_JUDGED 1

static __always_inline bool is_passed(__u32 tc_index)
{
	return (tc_index & ~TAG_JUDGED) == tag;
}

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&guard_counters, &counter);

	if (value)
		*value += 1;
}

/* What walk_extensions returns besides the protocol at *at. */
#define WALK_PIECE (-1)	  /* a fragment that has no transport header, or shall count as one */
#define WALK_NOTHING (-2) /* a fragment of another protocol */

/* walk_extensions follows the headers of IPv6 from the one at *at, which is of
 * the given type, to that of a transport protocol. What cannot be followed to
 * its end counts as a fragment and is judged by its addresses. */
static __always_inline int walk_extensions(GUARD_SOURCE source, __u32 *at, __u8 type)
{
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 header[8];

		if (type == IPPROTO_FRAGMENT) {
			if (load(source, *at, header, sizeof(header)))
				return WALK_PIECE;
			if (header[0] == IPPROTO_UDP)
				return WALK_NOTHING;
			if (header[2] || header[3] & 0xf9) /* offset, more fragments */
				return header[0] == IPPROTO_ICMPV6 ? WALK_NOTHING : WALK_PIECE;
			*at += sizeof(header);
		} else if (is_extension(type)) {
			if (load(source, *at, header, 2))
				return WALK_PIECE;
			*at += type == IPPROTO_AH ? (header[1] + 2) * 4 : (header[1] + 1) * 8;
		} else {
			return type;
		}
		type = header[0];
	}
	return WALK_PIECE;
}

/* outbound is that of the packet that has ports and addresses, which in an ICMP
 * error goes against that of the error. */
static __always_inline int walk_ports(GUARD_SOURCE source, __u32 at, struct packet *p, bool outbound, bool icmp)
{
	__u8 tcp[14];

	if (icmp) {
		if (load(source, at, tcp, 4))
			return KIND_ICMP_FRAGMENT;
	} else {
		if (load(source, at, tcp, sizeof(tcp)))
			return KIND_TCP_FRAGMENT;
		p->flags = tcp[13];
	}
	set_ports(&p->key, (__be16 *)tcp, outbound);
	return icmp ? KIND_ICMP_ERROR : KIND_TCP;
}

static __always_inline int walk_icmp4(GUARD_SOURCE source, __u32 at, struct packet *p, bool outbound)
{
	struct iphdr ip;
	__u8 type;

	if (load(source, at, &type, 1) || !is_icmp4_error(type) || load(source, at + ICMP_HEADER, &ip, sizeof(ip)) ||
	    ip.protocol != IPPROTO_TCP || ip.frag_off & bpf_htons(IP_OFFSET))
		return KIND_OTHER;
	set_addresses_v4(&p->key, &ip, outbound);
	return walk_ports(source, at + ICMP_HEADER + ip.ihl * 4, p, outbound, true);
}

static __always_inline int walk_icmp6(GUARD_SOURCE source, __u32 at, struct packet *p, bool outbound)
{
	struct ipv6hdr ip;
	__u8 type;

	if (load(source, at, &type, 1) || !is_icmp6_error(type) || load(source, at + ICMP_HEADER, &ip, sizeof(ip)))
		return KIND_OTHER;
	set_addresses_v6(&p->key, &ip, outbound);
	at += ICMP_HEADER + sizeof(ip);
	switch (walk_extensions(source, &at, ip.nexthdr)) {
	case IPPROTO_TCP:
		return walk_ports(source, at, p, outbound, true);
	case WALK_PIECE:
		return KIND_ICMP_FRAGMENT;
	}
	return KIND_OTHER;
}

static __always_inline int walk_v4(GUARD_SOURCE source, __u32 at, struct packet *p, bool outbound)
{
	struct iphdr ip;

	if (load(source, at, &ip, sizeof(ip)))
		return KIND_OTHER;
	if (ip.protocol == IPPROTO_TCP) {
		set_addresses_v4(&p->key, &ip, outbound);
		if (ip.frag_off & bpf_htons(IP_MF_OFFSET))
			return KIND_TCP_FRAGMENT;
		return walk_ports(source, at + ip.ihl * 4, p, outbound, false);
	}
	if (ip.protocol == IPPROTO_ICMP && !(ip.frag_off & bpf_htons(IP_MF_OFFSET)))
		return walk_icmp4(source, at + ip.ihl * 4, p, !outbound);
	return KIND_OTHER;
}

static __always_inline int walk_v6(GUARD_SOURCE source, __u32 at, struct packet *p, bool outbound)
{
	struct ipv6hdr ip;

	if (load(source, at, &ip, sizeof(ip)))
		return KIND_OTHER;
	set_addresses_v6(&p->key, &ip, outbound);
	at += sizeof(ip);
	switch (walk_extensions(source, &at, ip.nexthdr)) {
	case IPPROTO_TCP:
		return walk_ports(source, at, p, outbound, false);
	case IPPROTO_ICMPV6:
		return walk_icmp6(source, at, p, !outbound);
	case WALK_PIECE:
		return KIND_TCP_FRAGMENT;
	}
	return KIND_OTHER;
}

enum listed { UNLISTED, LISTED_FLOW, LISTED_FRAGMENT, LISTED_ICMP, REFUSED };

static __always_inline void turn(struct flow_key *key)
{
	struct flow_key from = *key;

	__builtin_memcpy(key->local, from.remote, sizeof(key->local));
	__builtin_memcpy(key->remote, from.local, sizeof(key->remote));
	key->lport = from.rport;
	key->rport = from.lport;
}

/* look_up judges a parsed packet by the connections that are listed. An ICMP
 * error of this host quotes what came in, or, to itself, what went out. */
static __always_inline enum listed look_up(struct packet *p, int kind, bool outbound)
{
	struct pair_key pair;

	p->key.vlan = 0;
	switch (kind) {
	case KIND_TCP:
		return bpf_map_lookup_elem(&guard_flows, &p->key) ? LISTED_FLOW : UNLISTED;
	case KIND_TCP_FRAGMENT:
		pair = pair_of(&p->key);
		return bpf_map_lookup_elem(&guard_pairs, &pair) ? LISTED_FRAGMENT : UNLISTED;
	case KIND_ICMP_ERROR:
		if (bpf_map_lookup_elem(&guard_flows, &p->key))
			return LISTED_ICMP;
		if (!outbound)
			return UNLISTED;
		turn(&p->key);
		return bpf_map_lookup_elem(&guard_flows, &p->key) ? LISTED_ICMP : UNLISTED;
	case KIND_ICMP_FRAGMENT:
		pair = pair_of(&p->key);
		if (bpf_map_lookup_elem(&guard_pairs, &pair))
			return LISTED_ICMP;
		if (!outbound)
			return UNLISTED;
		turn(&p->key);
		pair = pair_of(&p->key);
		return bpf_map_lookup_elem(&guard_pairs, &pair) ? LISTED_ICMP : UNLISTED;
	}
	return UNLISTED;
}

#endif
