// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//go:build ignore

/* The guard at the sockets, by cgroup: whatever way a segment came, through a
 * tunnel, another interface, loopback or in fragments, here it is about to
 * enter a socket. */
#include "packet.h"

#define GUARD_SOURCE struct __sk_buff *
#define load(skb, at, to, length) bpf_skb_load_bytes(skb, at, to, length)
#include "guard.h"

#define DROP 0
#define PASS 1

#define AF_INET 2
#define TCP_LISTEN 10

/* Set before loading: the cookie of the network namespace that is guarded. */
const volatile __u64 netns;

static __always_inline int judge_packet(struct __sk_buff *skb, struct packet *p, bool outbound)
{
	int kind = KIND_OTHER;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		kind = walk_v4(skb, 0, p, outbound);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		kind = walk_v6(skb, 0, p, outbound);
	return look_up(p, kind, outbound);
}

/* The barriers keep the compiler from merging loads into arithmetic on the
 * pointer, which the verifier forbids. */
static __always_inline void key_of_socket(struct bpf_sock *sk, struct flow_key *key)
{
	if (sk->family == AF_INET) {
		__u32 local = sk->src_ip4, remote;

		barrier_var(local);
		remote = sk->dst_ip4;
		barrier_var(remote);
		set_v4(key->local, local);
		set_v4(key->remote, remote);
	} else {
		key->local[0] = sk->src_ip6[0];
		key->local[1] = sk->src_ip6[1];
		key->local[2] = sk->src_ip6[2];
		key->local[3] = sk->src_ip6[3];
		key->remote[0] = sk->dst_ip6[0];
		key->remote[1] = sk->dst_ip6[1];
		key->remote[2] = sk->dst_ip6[2];
		key->remote[3] = sk->dst_ip6[3];
	}
	key->lport = bpf_htons((__u16)sk->src_port);
	key->rport = sk->dst_port;
}

static __always_inline int socket_in(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct packet p = {};

	if (is_passed(skb->tc_index))
		return PASS;
	if (!sk)
		return PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->protocol != IPPROTO_TCP)
		return PASS;
	if (sk->state != TCP_LISTEN) {
		key_of_socket(sk, &p.key);
		if (!bpf_map_lookup_elem(&guard_flows, &p.key))
			return PASS;
		count(CGROUP_IN_COUNT_FLOW);
		return DROP;
	}
	/* A connection that is being opened has no socket yet. */
	switch (judge_packet(skb, &p, false)) {
	case LISTED_FLOW:
		count(CGROUP_IN_COUNT_FLOW);
		return DROP;
	case LISTED_FRAGMENT:
		count(CGROUP_IN_COUNT_FRAGMENT);
		return DROP;
	}
	return PASS;
}

static __always_inline int socket_out(struct __sk_buff *skb)
{
	__u32 device = skb->ifindex;
	struct bpf_sock *sk = skb->sk;
	struct packet p = {};

	if (!sk)
		return PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->protocol != IPPROTO_TCP || bpf_map_lookup_elem(&guard_exits, &device))
		return PASS;
	/* By the packet, which NAT may have made another than the socket's. */
	switch (judge_packet(skb, &p, true)) {
	case LISTED_FLOW:
		count(CGROUP_OUT_COUNT_FLOW);
		return DROP;
	case LISTED_FRAGMENT:
		count(CGROUP_OUT_COUNT_FRAGMENT);
		return DROP;
	}
	return PASS;
}

/* The programs meet the sockets of the whole machine: first of all they pass
 * everything while nothing is listed, and what is not of their namespace. */
static __always_inline bool concerns(struct __sk_buff *skb)
{
	return listing() && bpf_get_netns_cookie(skb) == netns;
}

SEC("cgroup_skb/ingress")
int guard_socket_in(struct __sk_buff *skb)
{
	return concerns(skb) ? socket_in(skb) : PASS;
}

SEC("cgroup_skb/egress")
int guard_socket_out(struct __sk_buff *skb)
{
	return concerns(skb) ? socket_out(skb) : PASS;
}

char _license[] SEC("license") = "GPL";
