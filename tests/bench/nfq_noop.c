/* The most that a queue can give: reads NFQUEUE messages and drops all, one verdict per batch.
 *
 *   nfq_noop QUEUE
 *
 * Prints "ready" once the queue is bound, then runs until it is ended.  Messages and attributes
 * are those of linux/netfilter/nfnetlink_queue.h.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BATCH = 64, ROOM = 2048, LENGTH = 4096 };

struct request {
	struct nlmsghdr header;
	struct nfgenmsg family;
	struct nlattr attribute;
	uint8_t value[16];
} __attribute__((packed, aligned(4)));

static int ask(int netlink, int queue, int type, int attribute, const void *value, int length)
{
	struct request request = {
		.header = {
			.nlmsg_len = NLMSG_LENGTH(sizeof(struct nfgenmsg)) + NLA_HDRLEN + NLA_ALIGN(length),
			.nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | type,
			.nlmsg_flags = NLM_F_REQUEST,
		},
		.family = { .nfgen_family = AF_UNSPEC, .res_id = htons(queue) },
		.attribute = { .nla_len = NLA_HDRLEN + length, .nla_type = attribute },
	};

	memcpy(request.value, value, length);
	return send(netlink, &request, request.header.nlmsg_len, 0);
}

/* Returns the packet's number, or 0 if the message brings none: numbers begin at 1. */
static uint32_t packet_number(const struct nlmsghdr *message)
{
	const char *at = (const char *)message + NLMSG_LENGTH(sizeof(struct nfgenmsg));
	const char *end = (const char *)message + message->nlmsg_len;

	if (message->nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
		return 0;
	while (at + NLA_HDRLEN <= end) {
		const struct nlattr *attribute = (const void *)at;

		if ((attribute->nla_type & NLA_TYPE_MASK) == NFQA_PACKET_HDR)
			return ntohl(((const struct nfqnl_msg_packet_hdr *)(at + NLA_HDRLEN))->packet_id);
		if (attribute->nla_len < NLA_HDRLEN)
			break;
		at += NLA_ALIGN(attribute->nla_len);
	}
	return 0;
}

int main(int count, char **words)
{
	static char rooms[BATCH][ROOM];
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
	struct nfqnl_msg_config_cmd bind_it = { .command = NFQNL_CFG_CMD_BIND, .pf = htons(AF_INET) };
	struct nfqnl_msg_config_params params = { htonl(128), NFQNL_COPY_PACKET };
	uint32_t length = htonl(LENGTH);
	int netlink, queue, one = 1, room = 8 << 20;

	if (count != 2) {
		fprintf(stderr, "usage: nfq_noop QUEUE\n");
		return 2;
	}
	queue = atoi(words[1]);
	netlink = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);
	if (connect(netlink, (void *)&kernel, sizeof(kernel)) < 0) {
		perror("nfq_noop");
		return 1;
	}
	setsockopt(netlink, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room));
	setsockopt(netlink, SOL_NETLINK, NETLINK_NO_ENOBUFS, &one, sizeof(one));
	ask(netlink, queue, NFQNL_MSG_CONFIG, NFQA_CFG_CMD, &bind_it, sizeof(bind_it));
	ask(netlink, queue, NFQNL_MSG_CONFIG, NFQA_CFG_PARAMS, &params, sizeof(params));
	ask(netlink, queue, NFQNL_MSG_CONFIG, NFQA_CFG_QUEUE_MAXLEN, &length, sizeof(length));
	puts("ready");
	fflush(stdout);

	for (int i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){ rooms[i], ROOM };
		messages[i] = (struct mmsghdr){ .msg_hdr = { .msg_iov = &parts[i], .msg_iovlen = 1 } };
	}
	for (;;) {
		int got = recvmmsg(netlink, messages, BATCH, MSG_WAITFORONE, NULL);
		uint32_t last = 0;

		for (int i = 0; i < got; i++) {
			uint32_t number = packet_number((const void *)rooms[i]);

			last = number ? number : last;
		}
		if (last) {
			struct nfqnl_msg_verdict_hdr verdict = { htonl(NF_DROP), htonl(last) };

			ask(netlink, queue, NFQNL_MSG_VERDICT_BATCH, NFQA_VERDICT_HDR, &verdict,
			    sizeof(verdict));
		}
	}
}
