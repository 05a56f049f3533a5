// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What is to become of new connections. The diverter takes those that are to be
 * encrypted to the process; the guard refuses, without the process, those that
 * must not be plain. */
#ifndef TCPCRYPT_POLICY_H
#define TCPCRYPT_POLICY_H

#include "packet.h"

#define MAX_RULES 64

/* The order is that of the Go constants. */
enum verdict {
	VERDICT_ENCRYPT,
	VERDICT_REQUIRE,
	VERDICT_PLAIN,
};

struct rule {
	__u32 local[4];
	__u32 local_mask[4];
	__u32 remote[4];
	__u32 remote_mask[4];
	__u16 lport[2]; /* first and last, host order */
	__u16 rport[2];
	__u32 verdict;
};

struct policy {
	__u32 rules;	/* of rule, the first that matches decides */
	__u32 selected; /* else, one port in include and none in exclude: this */
	struct rule rule[MAX_RULES];
	__u64 include[1024];
	__u64 exclude[1024];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct policy);
} policy SEC(".maps");

static __always_inline bool bit(const __u64 *bits, __u16 port)
{
	return bits[(port >> 6) & 1023] >> (port & 63) & 1;
}

static __always_inline __u32 outside(const __u32 *address, const __u32 *prefix, const __u32 *mask)
{
	return ((address[0] ^ prefix[0]) & mask[0]) | ((address[1] ^ prefix[1]) & mask[1]) |
	       ((address[2] ^ prefix[2]) & mask[2]) | ((address[3] ^ prefix[3]) & mask[3]);
}

struct search {
	const struct policy *policy;
	struct flow_key key;
	__u16 lport, rport;
	int found; /* verdict, or -1 */
};

/* In a callback of bpf_loop, which is verified once and not for each rule. */
static long match(__u64 i, struct search *s)
{
	const struct rule *r;

	if (i >= MAX_RULES || i >= s->policy->rules)
		return 1;
	r = &s->policy->rule[i];
	if (outside(s->key.local, r->local, r->local_mask) | outside(s->key.remote, r->remote, r->remote_mask))
		return 0;
	if (s->lport < r->lport[0] || s->lport > r->lport[1] || s->rport < r->rport[0] || s->rport > r->rport[1])
		return 0;
	s->found = r->verdict;
	return 1;
}

/* Not static: a global function is verified once, not for each state of its
 * callers. */
__noinline int verdict(const struct flow_key *key)
{
	__u32 zero = 0;
	struct policy *p = bpf_map_lookup_elem(&policy, &zero);
	struct search s = {.policy = p, .found = -1};

	if (!p || !key)
		return VERDICT_PLAIN;
	s.key = *key;
	s.lport = bpf_ntohs(key->lport);
	s.rport = bpf_ntohs(key->rport);
	if (p->rules) {
		bpf_loop(MAX_RULES, match, &s, 0);
		if (s.found >= 0)
			return s.found;
	}
	if (bit(p->exclude, s.lport) || bit(p->exclude, s.rport))
		return VERDICT_PLAIN;
	if (bit(p->include, s.lport) || bit(p->include, s.rport))
		return p->selected;
	return VERDICT_PLAIN;
}

static __always_inline bool is_syn(__u8 flags)
{
	return (flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

#endif
