// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What all programs share: the flow key and the walk from the Ethernet header
 * to TCP. Nothing here trusts a length before it was compared with the end of
 * the packet. */
#ifndef TCPCRYPT_PACKET_H
#define TCPCRYPT_PACKET_H

#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define VLAN_VID_MASK 0x0fff
#define IP_OFFSET 0x1fff
#define IP_MF_OFFSET 0x3fff /* more-fragments flag and offset */

#define ICMP_DEST_UNREACH 3
#define ICMP_SOURCE_QUENCH 4
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PARAMPROB 4 /* 2 is packet too big, 3 time exceeded */
#define ICMP_HEADER 8

#define IPV6_TLV_JUMBO 194
#define HOP_JUMBO 8

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define TCP_HEADER 20
#define TCP_MAX_OPTIONS 40

/* Ethernet, one tag, the longest IP header that is looked into, TCP with
 * options: more is never read. */
#define MAX_HEADERS (14 + 4 + 60 + 60)

/* A connection as this host sees it. IPv4 addresses are v4-mapped. */
struct flow_key {
	__u32 local[4];
	__u32 remote[4];
	__be16 lport;
	__be16 rport;
	__u16 vlan; /* identifier without priority, 0: no tag */
	__u16 pad;
};

struct pair_key {
	__u32 local[4];
	__u32 remote[4];
};

enum kind {
	KIND_OTHER,	   /* nothing that concerns a flow */
	KIND_TCP,	   /* key, tcp, flags and header are set */
	KIND_TCP_FRAGMENT, /* addresses of key are set */
	KIND_ICMP_ERROR,   /* key is that of the embedded packet, which went the
			    * other way */
	KIND_ICMP_FRAGMENT, /* the same, and only the addresses of key are set */
	KIND_EXTENSION,	   /* IPv6 with extension headers, or an error about it */
	KIND_STACKED,	   /* more than one tag, or a service tag */
	KIND_SHORT,	   /* ends, or the linear part of it, before its headers do */
};

struct packet {
	struct flow_key key;
	__u32 tcp;    /* offset of the TCP header */
	__u32 header; /* its length */
	__u32 l3;     /* offset of the IP header */
	__u8 flags;   /* of TCP */
	__u8 v4;
};

static __always_inline void set_v4(__u32 *address, __be32 v4)
{
	address[0] = 0;
	address[1] = 0;
	address[2] = bpf_htonl(0xffff);
	address[3] = v4;
}

static __always_inline void set_v6(__u32 *address, const struct in6_addr *v6)
{
	address[0] = v6->in6_u.u6_addr32[0];
	address[1] = v6->in6_u.u6_addr32[1];
	address[2] = v6->in6_u.u6_addr32[2];
	address[3] = v6->in6_u.u6_addr32[3];
}

/* outbound tells which of source and destination is local. */
static __always_inline void set_addresses_v4(struct flow_key *key, const struct iphdr *ip, bool outbound)
{
	set_v4(outbound ? key->local : key->remote, ip->saddr);
	set_v4(outbound ? key->remote : key->local, ip->daddr);
}

static __always_inline void set_addresses_v6(struct flow_key *key, const struct ipv6hdr *ip, bool outbound)
{
	set_v6(outbound ? key->local : key->remote, &ip->saddr);
	set_v6(outbound ? key->remote : key->local, &ip->daddr);
}

static __always_inline void set_ports(struct flow_key *key, const __be16 *ports, bool outbound)
{
	key->lport = outbound ? ports[0] : ports[1];
	key->rport = outbound ? ports[1] : ports[0];
}

static __always_inline struct pair_key pair_of(const struct flow_key *key)
{
	struct pair_key pair;

	__builtin_memcpy(pair.local, key->local, sizeof(pair.local));
	__builtin_memcpy(pair.remote, key->remote, sizeof(pair.remote));
	return pair;
}

static __always_inline bool is_extension(__u8 type)
{
	switch (type) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_MH:
	case IPPROTO_AH:
		return true;
	}
	return false;
}

/* The hop-by-hop options with which the kernel marks TCP of more than 64 KiB on its
 * way to a device. They go when it is cut, so no segment leaves with them. */
static __always_inline bool is_big_tcp(const __u8 *next)
{
	return next[0] == IPPROTO_TCP && next[1] == 0 && next[2] == IPV6_TLV_JUMBO && next[3] == 4;
}

static __always_inline int parse_tcp(void *data, void *end, void *l4, bool outbound, struct packet *p)
{
	__u8 *tcp = l4;

	if (tcp + TCP_HEADER > (__u8 *)end)
		return KIND_SHORT;
	set_ports(&p->key, l4, outbound);
	p->tcp = l4 - data;
	p->header = (tcp[12] >> 4) * 4;
	p->flags = tcp[13];
	return KIND_TCP;
}

static __always_inline bool is_icmp4_error(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB ||
	       type == ICMP_SOURCE_QUENCH;
}

static __always_inline bool is_icmp6_error(__u8 type)
{
	return type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB;
}

/* An ICMP error carries the start of the packet that met it; outbound is that
 * packet's direction. */
static __always_inline int parse_icmp4(void *end, void *l4, bool outbound, struct packet *p)
{
	__u8 *icmp = l4;
	struct iphdr *ip = l4 + ICMP_HEADER;
	__be16 *ports;

	if (icmp + 1 > (__u8 *)end)
		return KIND_SHORT;
	if (!is_icmp4_error(*icmp))
		return KIND_OTHER;
	if ((void *)(ip + 1) > end)
		return KIND_SHORT;
	if (ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_TCP ||
	    ip->frag_off & bpf_htons(IP_OFFSET))
		return KIND_OTHER;
	ports = (void *)ip + ip->ihl * 4;
	if ((void *)(ports + 2) > end)
		return KIND_SHORT;
	set_addresses_v4(&p->key, ip, outbound);
	set_ports(&p->key, ports, outbound);
	return KIND_ICMP_ERROR;
}

static __always_inline int parse_icmp6(void *end, void *l4, bool outbound, struct packet *p)
{
	__u8 *icmp = l4;
	struct ipv6hdr *ip = l4 + ICMP_HEADER;
	__be16 *ports = (void *)(ip + 1);

	if (icmp + 1 > (__u8 *)end)
		return KIND_SHORT;
	if (!is_icmp6_error(*icmp))
		return KIND_OTHER;
	if ((void *)(ip + 1) > end)
		return KIND_SHORT;
	if (ip->version != 6)
		return KIND_OTHER;
	set_addresses_v6(&p->key, ip, outbound);
	if (ip->nexthdr == IPPROTO_FRAGMENT || is_extension(ip->nexthdr))
		return KIND_EXTENSION;
	if (ip->nexthdr != IPPROTO_TCP)
		return KIND_OTHER;
	if ((void *)(ports + 2) > end)
		return KIND_SHORT;
	set_ports(&p->key, ports, outbound);
	return KIND_ICMP_ERROR;
}

static __always_inline int parse_v4(void *data, void *end, void *l3, bool outbound, struct packet *p)
{
	struct iphdr *ip = l3;
	void *l4;

	if ((void *)(ip + 1) > end)
		return KIND_SHORT;
	if (ip->version != 4 || ip->ihl < 5)
		return KIND_OTHER;
	if (ip->frag_off & bpf_htons(IP_MF_OFFSET)) {
		if (ip->protocol != IPPROTO_TCP)
			return KIND_OTHER;
		set_addresses_v4(&p->key, ip, outbound);
		return KIND_TCP_FRAGMENT;
	}
	l4 = l3 + ip->ihl * 4;
	switch (ip->protocol) {
	case IPPROTO_TCP:
		set_addresses_v4(&p->key, ip, outbound);
		p->v4 = 1;
		return parse_tcp(data, end, l4, outbound, p);
	case IPPROTO_ICMP:
		return parse_icmp4(end, l4, !outbound, p);
	}
	return KIND_OTHER;
}

static __always_inline int parse_v6(void *data, void *end, void *l3, bool outbound, struct packet *p)
{
	struct ipv6hdr *ip = l3;
	void *l4 = ip + 1;
	__u8 *next = l4;

	if ((void *)(ip + 1) > end)
		return KIND_SHORT;
	if (ip->version != 6)
		return KIND_OTHER;
	switch (ip->nexthdr) {
	case IPPROTO_TCP:
		set_addresses_v6(&p->key, ip, outbound);
		return parse_tcp(data, end, l4, outbound, p);
	case IPPROTO_ICMPV6:
		return parse_icmp6(end, l4, !outbound, p);
	case IPPROTO_FRAGMENT:
		set_addresses_v6(&p->key, ip, outbound);
		if (next + 8 > (__u8 *)end)
			return KIND_SHORT;
		return *next == IPPROTO_TCP ? KIND_TCP_FRAGMENT : KIND_EXTENSION;
	}
	if (!is_extension(ip->nexthdr))
		return KIND_OTHER;
	set_addresses_v6(&p->key, ip, outbound);
	if (outbound && ip->nexthdr == IPPROTO_HOPOPTS && next + HOP_JUMBO <= (__u8 *)end && is_big_tcp(next))
		return parse_tcp(data, end, next + HOP_JUMBO, outbound, p);
	return KIND_EXTENSION;
}

/* p->key must be zero except for vlan, which is that of a tag that the kernel
 * has already taken off. */
static __always_inline int parse(void *data, void *end, bool outbound, struct packet *p)
{
	struct ethhdr *eth = data;
	void *l3 = eth + 1;
	__be16 proto;

	if (l3 > end)
		return KIND_SHORT;
	proto = eth->h_proto;
	if (proto == bpf_htons(ETH_P_8021Q)) {
		__be16 *tag = l3;

		l3 += 4;
		if (l3 > end)
			return KIND_SHORT;
		if (p->key.vlan)
			return KIND_STACKED;
		p->key.vlan = bpf_ntohs(tag[0]) & VLAN_VID_MASK;
		proto = tag[1];
	}
	p->l3 = l3 - data;
	switch (proto) {
	case bpf_htons(ETH_P_IP):
		return parse_v4(data, end, l3, outbound, p);
	case bpf_htons(ETH_P_IPV6):
		return parse_v6(data, end, l3, outbound, p);
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
		return KIND_STACKED;
	}
	return KIND_OTHER;
}

/* parse_skb is parse for a socket buffer, whose headers need not be linear and
 * whose tag is usually in its metadata. */
static __noinline __attribute__((unused)) int parse_skb(struct __sk_buff *skb, struct packet *p, bool outbound)
{
	__u16 vlan = 0;
	int kind;

	if (!p)
		return KIND_OTHER;
	if (skb->vlan_present) {
		if (skb->vlan_proto != bpf_htons(ETH_P_8021Q))
			return KIND_STACKED;
		vlan = skb->vlan_tci & VLAN_VID_MASK;
	}
	__builtin_memset(p, 0, sizeof(*p));
	p->key.vlan = vlan;
	kind = parse((void *)(long)skb->data, (void *)(long)skb->data_end, outbound, p);
	if (kind == KIND_SHORT) {
		/* Most packets have linear headers: pulling costs a copy of a
		 * cloned buffer's head and is left to those that need it. */
		__u32 want = skb->len < MAX_HEADERS ? skb->len : MAX_HEADERS;

		if (bpf_skb_pull_data(skb, want))
			return KIND_SHORT;
		__builtin_memset(p, 0, sizeof(*p));
		p->key.vlan = vlan;
		kind = parse((void *)(long)skb->data, (void *)(long)skb->data_end, outbound, p);
	}
	return kind;
}

#endif
