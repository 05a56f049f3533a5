// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//go:build ignore

/* Host mode: takes TCP connections that this host negotiates or encrypts off
 * the network card and off its own stack, and lets everything else pass.
 *
 *   wire -> host_xdp -> AF_XDP -> process -> TAP -> tap_ingress -> NIC ingress
 *   stack -> nic_egress -> TAP -> process -> AF_XDP -> wire
 */
#include "divert.h"

#define TCX_NEXT TC_ACT_UNSPEC

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, MAX_QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

/* The order is that of hostCounters in Go. */
enum counter {
	XDP_COUNT_PASS,
	XDP_COUNT_SHORT,
	XDP_COUNT_STACKED,
	XDP_COUNT_EXTENSION,
	XDP_COUNT_INJECTED,
	XDP_COUNT_FLOW,
	XDP_COUNT_FLOW_NO_SOCKET,
	XDP_COUNT_FLOW_STALE,
	XDP_COUNT_SYN,
	XDP_COUNT_SYN_NO_SOCKET,
	XDP_COUNT_SYN_STALE,
	XDP_COUNT_SYN_SHED,
	XDP_COUNT_FRAGMENT,
	XDP_COUNT_ICMP,
	XDP_COUNT_ICMP_NO_SOCKET,
	EGRESS_COUNT_PASS,
	EGRESS_COUNT_SHORT,
	EGRESS_COUNT_STACKED,
	EGRESS_COUNT_EXTENSION,
	EGRESS_COUNT_INJECTED,
	EGRESS_COUNT_FLOW,
	EGRESS_COUNT_FLOW_STALE,
	EGRESS_COUNT_SYN,
	EGRESS_COUNT_SYN_STALE,
	EGRESS_COUNT_FRAGMENT,
	TAP_COUNT_INJECTED,
	TAP_COUNT_FRAGMENT,
	TAP_COUNT_OTHER,
	COUNTER_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTER_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Set before loading. */
const volatile __u32 nic_ifindex;
const volatile __u32 tap_ifindex;
const volatile __u32 mark;		/* on injected packets, never 0 */
const volatile __u32 inject_mac_high;	/* the first four bytes, as loaded */
const volatile __u16 inject_mac_low;	/* the last two */

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

/* A segment of a listed flow never reaches the stack: what cannot be
 * redirected is dropped. */
static __always_inline int to_socket(struct xdp_md *ctx, __u32 redirected, __u32 failed, int fallback)
{
	int verdict = bpf_redirect_map(&xsks, ctx->rx_queue_index, fallback);

	count(verdict == XDP_REDIRECT ? redirected : failed);
	return verdict;
}

static __always_inline int pass(__u32 counter)
{
	count(counter);
	return XDP_PASS;
}

static __always_inline int from_wire(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct packet p = {};
	struct pair_key pair;

	if (control_value(CONTROL_GENERIC) && data + ETH_HLEN <= end) {
		struct ethhdr *eth = data;

		if (*(__u32 *)&eth->h_source[0] == inject_mac_high &&
		    *(__u16 *)&eth->h_source[4] == inject_mac_low)
			return pass(XDP_COUNT_INJECTED);
	}
	switch (parse(data, end, false, &p)) {
	case KIND_TCP:
		if (bpf_map_lookup_elem(&flows, &p.key)) {
			if (stale()) {
				count(XDP_COUNT_FLOW_STALE);
				return XDP_DROP;
			}
			return to_socket(ctx, XDP_COUNT_FLOW, XDP_COUNT_FLOW_NO_SOCKET, XDP_DROP);
		}
		if (is_syn(p.flags) && concerns(ctx, &p, end - data)) {
			if (stale())
				return pass(XDP_COUNT_SYN_STALE);
			if (control_value(CONTROL_SHED))
				return pass(XDP_COUNT_SYN_SHED);
			return to_socket(ctx, XDP_COUNT_SYN, XDP_COUNT_SYN_NO_SOCKET, XDP_PASS);
		}
		return pass(XDP_COUNT_PASS);
	case KIND_TCP_FRAGMENT:
		pair = pair_of(&p.key);
		if (bpf_map_lookup_elem(&pairs, &pair)) {
			count(XDP_COUNT_FRAGMENT);
			return XDP_DROP;
		}
		return pass(XDP_COUNT_PASS);
	case KIND_ICMP_ERROR:
		if (bpf_map_lookup_elem(&flows, &p.key))
			return to_socket(ctx, XDP_COUNT_ICMP, XDP_COUNT_ICMP_NO_SOCKET, XDP_DROP);
		return pass(XDP_COUNT_PASS);
	case KIND_EXTENSION:
		return pass(XDP_COUNT_EXTENSION);
	case KIND_STACKED:
		return pass(XDP_COUNT_STACKED);
	case KIND_SHORT:
		return pass(XDP_COUNT_SHORT);
	}
	return pass(XDP_COUNT_PASS);
}

SEC("xdp")
int host_xdp(struct xdp_md *ctx)
{
	return from_wire(ctx);
}

/* For an MTU above what fits one buffer of the driver. */
SEC("xdp.frags")
int host_xdp_frags(struct xdp_md *ctx)
{
	return from_wire(ctx);
}

static __always_inline int next(__u32 counter)
{
	count(counter);
	return TCX_NEXT;
}

static __always_inline int shot(__u32 counter)
{
	count(counter);
	return TC_ACT_SHOT;
}

static __always_inline int to_tap(__u32 counter)
{
	count(counter);
	return bpf_redirect(tap_ifindex, 0);
}

SEC("tc")
int nic_egress(struct __sk_buff *skb)
{
	struct packet p = {};
	struct pair_key pair;

	/* Injected, and forwarded by the stack instead of received. */
	if (skb->mark == mark)
		return next(EGRESS_COUNT_INJECTED);
	switch (parse_skb(skb, &p, true)) {
	case KIND_TCP:
		if (bpf_map_lookup_elem(&flows, &p.key)) {
			/* SYNs and their answers wait for the process: a socket
			 * that is told of drops gives up after five seconds, one
			 * that answers at once. */
			if (!(p.flags & TCP_SYN) && stale())
				return shot(EGRESS_COUNT_FLOW_STALE);
			return to_tap(EGRESS_COUNT_FLOW);
		}
		if (is_syn(p.flags) && control_value(CONTROL_ENABLED) && verdict(&p.key) != VERDICT_PLAIN) {
			if (stale())
				return next(EGRESS_COUNT_SYN_STALE);
			return to_tap(EGRESS_COUNT_SYN);
		}
		return next(EGRESS_COUNT_PASS);
	case KIND_TCP_FRAGMENT:
		pair = pair_of(&p.key);
		if (bpf_map_lookup_elem(&pairs, &pair))
			return shot(EGRESS_COUNT_FRAGMENT);
		return next(EGRESS_COUNT_PASS);
	case KIND_EXTENSION:
		return next(EGRESS_COUNT_EXTENSION);
	case KIND_STACKED:
		return next(EGRESS_COUNT_STACKED);
	case KIND_SHORT:
		return next(EGRESS_COUNT_SHORT);
	}
	return next(EGRESS_COUNT_PASS);
}

/* Packets of the process go on as if they had arrived on the NIC. The mark is
 * what tells them from others there. A fragment must never carry it: it would
 * let a forged second fragment in. */
SEC("tc")
int tap_ingress(struct __sk_buff *skb)
{
	struct packet p = {};

	switch (parse_skb(skb, &p, false)) {
	case KIND_TCP:
	case KIND_ICMP_ERROR:
		break;
	case KIND_TCP_FRAGMENT:
		return shot(TAP_COUNT_FRAGMENT);
	default:
		return shot(TAP_COUNT_OTHER);
	}
	if (control_value(CONTROL_GENERIC)) {
		struct {
			__u32 high;
			__u16 low;
		} __attribute__((packed)) source = {inject_mac_high, inject_mac_low};

		if (bpf_skb_store_bytes(skb, ETH_ALEN, &source, sizeof(source), 0))
			return shot(TAP_COUNT_OTHER);
	}
	skb->mark = mark;
	count(TAP_COUNT_INJECTED);
	return bpf_redirect(nic_ifindex, BPF_F_INGRESS);
}

/* Chooses the TAP queue of a packet that nic_egress redirected: that of its
 * flow, else by the kernel's hash. A socket filter has no direct access. */
SEC("socket")
int tap_steer(struct __sk_buff *skb)
{
	struct flow_key key = {};
	__u32 l3 = ETH_HLEN, l4, *queue;
	__be16 proto, ports[2];

	if (bpf_skb_load_bytes(skb, ETH_HLEN - 2, &proto, 2))
		goto unknown;
	if (skb->vlan_present) {
		key.vlan = skb->vlan_tci & VLAN_VID_MASK;
	} else if (proto == bpf_htons(ETH_P_8021Q)) {
		__be16 tag[2];

		if (bpf_skb_load_bytes(skb, ETH_HLEN, tag, 4))
			goto unknown;
		key.vlan = bpf_ntohs(tag[0]) & VLAN_VID_MASK;
		proto = tag[1];
		l3 += 4;
	}
	if (proto == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)))
			goto unknown;
		set_addresses_v4(&key, &ip, true);
		l4 = l3 + ip.ihl * 4;
	} else if (proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)))
			goto unknown;
		set_addresses_v6(&key, &ip, true);
		l4 = l3 + sizeof(ip);
		if (ip.nexthdr == IPPROTO_HOPOPTS) /* of BIG TCP, see parse_v6 */
			l4 += HOP_JUMBO;
	} else {
		goto unknown;
	}
	if (bpf_skb_load_bytes(skb, l4, ports, sizeof(ports)))
		goto unknown;
	set_ports(&key, ports, true);
	queue = bpf_map_lookup_elem(&flows, &key);
	if (queue && *queue)
		return *queue - 1;
unknown:
	return skb->hash;
}

char _license[] SEC("license") = "GPL";
