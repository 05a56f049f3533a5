// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What the programs share that take connections to the process: which those are,
 * and what they are told of the process. */
#ifndef TCPCRYPT_DIVERT_H
#define TCPCRYPT_DIVERT_H

#include "policy.h"

#define TCPOPT_EOL 0
#define TCPOPT_NOP 1
#define TCPOPT_ENO 69

#define MAX_FLOWS 262144
#define MAX_QUEUES 1024

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow_key);
	__type(value, __u32); /* 0, or number of the TAP queue and 1 */
} flows SEC(".maps");

/* Address pairs that have flows; user space counts the flows of each. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct pair_key);
	__type(value, __u32);
} pairs SEC(".maps");

enum control {
	CONTROL_ENABLED, /* SYNs are diverted */
	CONTROL_GENERIC, /* XDP is generic: injected packets meet it again */
	CONTROL_BEAT,	 /* CLOCK_MONOTONIC in ns when the process last showed life */
	CONTROL_SHED,	 /* SYNs from the wire are not taken: too many flows are half-open */
	CONTROL_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CONTROL_MAX);
	__type(key, __u32);
	__type(value, __u64);
} control SEC(".maps");

/* Set before loading. */
const volatile __u64 heartbeat_timeout; /* ns, 0: no heartbeat */

static __always_inline __u64 control_value(__u32 key)
{
	__u64 *value = bpf_map_lookup_elem(&control, &key);

	return value ? *value : 0;
}

/* The process hangs: it would take packets and never give them back. */
static __always_inline bool stale(void)
{
	if (!heartbeat_timeout)
		return false;
	/* Signed, as the coarse clock lags behind the one that was written. */
	return (__s64)(bpf_ktime_get_coarse_ns() - control_value(CONTROL_BEAT)) > (__s64)heartbeat_timeout;
}

/* TCP-ENO is RFC 8547, section 4.1: an option of kind 69. */
__noinline int has_eno(struct xdp_md *ctx, __u32 tcp, __u32 header)
{
	/* Larger than 40, so that a masked index is inside. */
	__u8 options[64] = {};
	__u32 length = header - TCP_HEADER;
	__u32 at = 0;

	if (length < 2 || length > TCP_MAX_OPTIONS)
		return false;
	if (bpf_xdp_load_bytes(ctx, tcp + TCP_HEADER, options, length))
		return false;
	for (int i = 0; i < TCP_MAX_OPTIONS; i++) {
		__u8 kind, size;

		if (at + 1 >= length)
			return false;
		kind = options[at & 63];
		if (kind == TCPOPT_EOL)
			return false;
		if (kind == TCPOPT_NOP) {
			at++;
			continue;
		}
		size = options[(at + 1) & 63];
		if (size < 2 || at + size > length)
			return false;
		if (kind == TCPOPT_ENO)
			return true;
		at += size;
	}
	return false;
}

/* A SYN from the wire is for the process if it offers encryption that is wanted,
 * and if it is to be refused. One with data that must be discarded is, whatever
 * the policy says (RFC 8547, section 4.7). */
static __always_inline bool concerns(struct xdp_md *ctx, const struct packet *p, __u32 size)
{
	int v;

	if (!control_value(CONTROL_ENABLED))
		return false;
	v = verdict(&p->key);
	if (v == VERDICT_REQUIRE)
		return true;
	if (v == VERDICT_PLAIN && p->tcp + p->header >= size)
		return false;
	return has_eno(ctx, p->tcp, p->header);
}

#endif
