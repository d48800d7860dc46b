/* Sends TCP segments of ever new source addresses, as fast as one core can or at a given rate.
 *
 *   flood INTERFACE GATEWAY_MAC DESTINATION PORT SECONDS RATE SEED FLAGS...
 *
 * RATE 0 is flat out.  FLAGS are values of the TCP flag byte, used in turn.  PORT may be a range,
 * FIRST-LAST, whose ports are used in turn.  No source is repeated before 2^30 segments: sources are
 * 32.0.0.0-95.255.255.255 in the order of a full-period linear congruential generator that begins at
 * SEED.  If SEED is an address it is the source of all segments.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, SIZE = 54, MOST_FLAGS = 16 };

static uint32_t sum16(const uint8_t *bytes, int length, uint32_t sum)
{
	for (int i = 0; i < length; i += 2)
		sum += bytes[i] << 8 | bytes[i + 1];
	return sum;
}

static uint16_t folded(uint32_t sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum += sum >> 16;
	return htons(~sum & 0xffff);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void lay_out(uint8_t *frame, uint32_t source, uint32_t target, uint16_t port, int flags,
		    uint32_t number)
{
	struct iphdr *ip = (void *)(frame + 14);
	struct tcphdr *tcp = (void *)(frame + 34);
	uint32_t sum;

	memset(frame + 14, 0, SIZE - 14);
	ip->version = 4;
	ip->ihl = 5;
	ip->tot_len = htons(40);
	ip->frag_off = htons(0x4000);
	ip->ttl = 64;
	ip->protocol = IPPROTO_TCP;
	ip->saddr = htonl(source);
	ip->daddr = target;
	ip->check = folded(sum16(frame + 14, 20, 0));
	tcp->source = htons(1024 + number % 60000);
	tcp->dest = htons(port);
	tcp->seq = htonl(number * 2654435761u);
	tcp->doff = 5;
	frame[34 + 13] = flags;
	tcp->window = htons(64240);
	sum = sum16(frame + 26, 8, IPPROTO_TCP + 20);
	tcp->check = folded(sum16(frame + 34, 20, sum));
}

int main(int count, char **words)
{
	static uint8_t frames[BATCH][SIZE];
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP) };
	int flags[MOST_FLAGS], kinds = 0, one = 1, link;
	unsigned int mac[6];
	uint32_t random, number = 0, target;

	if (count < 9) {
		fprintf(stderr, "usage: flood INTERFACE MAC DESTINATION PORT SECONDS RATE SEED FLAGS...\n");
		return 2;
	}
	link = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_IP));
	to.sll_ifindex = if_nametoindex(words[1]);
	sscanf(words[2], "%x:%x:%x:%x:%x:%x", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5);
	target = inet_addr(words[3]);
	random = strtoul(words[7], NULL, 0);
	for (int i = 8; i < count && kinds < MOST_FLAGS; i++)
		flags[kinds++] = strtoul(words[i], NULL, 0);
	if (bind(link, (void *)&to, sizeof(to)) < 0) {
		perror("flood");
		return 1;
	}
	setsockopt(link, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one));
	for (int i = 0; i < BATCH; i++) {
		for (int j = 0; j < 6; j++)
			frames[i][j] = mac[j];
		frames[i][6] = 2;
		frames[i][11] = 1;
		frames[i][12] = 8;
		parts[i] = (struct iovec){ frames[i], SIZE };
		messages[i] = (struct mmsghdr){ .msg_hdr = { .msg_iov = &parts[i], .msg_iovlen = 1 } };
	}

	double began = now(), seconds = atof(words[5]), rate = atof(words[6]);
	int batch = rate > 0 && rate < 100 * BATCH ? 1 : BATCH, first = 0, last = 0;
	uint32_t only = strchr(words[7], '.') ? ntohl(inet_addr(words[7])) : 0;

	if (sscanf(words[4], "%d-%d", &first, &last) == 1)
		last = first;

	while (now() - began < seconds) {
		for (int i = 0; i < batch; i++) {
			random = (random * 1664525u + 1013904223u) & 0x3fffffff;
			lay_out(frames[i], only ? only : 0x20000000 + random, target,
				first + number % (last - first + 1), flags[number % kinds], number);
			number++;
		}
		for (int done = 0; done < batch;) {
			int sent = sendmmsg(link, messages + done, batch - done, 0);
			done += sent > 0 ? sent : 1;
		}
		while (rate > 0 && number > (now() - began) * rate)
			usleep(200);
	}
	printf("%u %.3f\n", number, now() - began);
	return 0;
}
