/* What reading the connection table costs whoever does nothing with it.
 *
 *     table_reader MARK MASK TIMES
 *
 * asks for the TCP connections whose mark, under MASK, equals MARK, of both families, TIMES times,
 * receives the answers, and prints for each time how many bytes they had and the microseconds of
 * processor time that it took.  The kernel's writing of the messages is most of it.
 */
#include <arpa/inet.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

static char request[256], answer[64 << 10];

static void attribute(int kind, const void *value, int length)
{
    struct nlmsghdr *head = (void *)request;
    struct nlattr *made = (void *)(request + head->nlmsg_len);

    made->nla_type = kind;
    made->nla_len = NLA_HDRLEN + length;
    memcpy((char *)made + NLA_HDRLEN, value, length);
    head->nlmsg_len += NLA_ALIGN(made->nla_len);
}

static long long used(void)
{
    struct timespec now;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static int fail(const char *what)
{
    perror(what);
    return 1;
}

/* Returns the bytes of one family's connections, or -1. */
static long long read_family(int channel, int family, uint32_t mark, uint32_t mask)
{
    /* CTA_FILTER and the protocol: only TCP, as the guard asks. */
    static const unsigned char filter[] = {8, 0, 1, 0, 8, 0, 0, 0};
    static const unsigned char protocol[] = {12, 0, 2, 0x80, 5, 0, 1, 0, IPPROTO_TCP, 0, 0, 0};
    struct nlmsghdr *head = (void *)request;
    struct nfgenmsg *generic = NLMSG_DATA(head);
    long long bytes = 0;

    memset(request, 0, sizeof request);
    head->nlmsg_len = NLMSG_LENGTH(sizeof *generic);
    head->nlmsg_type = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET;
    head->nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
    generic->nfgen_family = family;
    attribute(CTA_FILTER | NLA_F_NESTED, filter, sizeof filter);
    attribute(CTA_TUPLE_ORIG | NLA_F_NESTED, protocol, sizeof protocol);
    attribute(CTA_MARK, &mark, sizeof mark);
    attribute(CTA_MARK_MASK, &mask, sizeof mask);
    if (send(channel, request, head->nlmsg_len, 0) < 0)
        return -1;
    for (;;) {
        int got = recv(channel, answer, sizeof answer, 0), left = got;

        if (got < 0)
            return -1;
        bytes += got;
        for (head = (void *)answer; NLMSG_OK(head, left); head = NLMSG_NEXT(head, left)) {
            if (head->nlmsg_type == NLMSG_ERROR)
                return -1;
            if (head->nlmsg_type == NLMSG_DONE)
                return bytes;
        }
    }
}

int main(int count, char **words)
{
    int channel = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);

    if (count != 4)
        return fprintf(stderr, "usage: table_reader MARK MASK TIMES\n"), 2;
    if (channel < 0)
        return fail("socket");
    for (int times = atoi(words[3]); times > 0; times--) {
        uint32_t mark = htonl(strtoul(words[1], NULL, 0)), mask = htonl(strtoul(words[2], NULL, 0));
        long long before = used();
        long long four = read_family(channel, AF_INET, mark, mask);
        long long six = read_family(channel, AF_INET6, mark, mask);

        if (four < 0 || six < 0)
            return fail("recv");
        printf("%lld %lld\n", four + six, used() - before);
        fflush(stdout);
    }
    return 0;
}
