/* libslirp on a tap device; its connections lead to an echo server of this machine's own kernel.
   slirp ends TCP itself: what the client speaks with is its stack.   slirp TAP */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <net/if.h>
#include <linux/if_tun.h>
#include <arpa/inet.h>
#include <libslirp.h>

static int tap;
static struct pollfd polled[1024];
static int count;

static ssize_t out(const void *data, size_t length, void *o) { (void)o; return write(tap, data, length); }
static void complain(const char *text, void *o) { (void)o; fprintf(stderr, "%s\n", text); }
static int64_t now(void *o) { (void)o; struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000ll + t.tv_nsec; }
static void *timer_new(SlirpTimerCb f, void *p, void *o) { (void)f; (void)p; (void)o; return malloc(1); }
static void timer_free(void *t, void *o) { (void)o; free(t); }
static void timer_mod(void *t, int64_t when, void *o) { (void)t; (void)when; (void)o; }
static void fd(int one, void *o) { (void)one; (void)o; }
static void notify(void *o) { (void)o; }
static int add(int one, int events, void *o)
{
    (void)o;
    polled[count].fd = one;
    polled[count].events = (events & SLIRP_POLL_IN ? POLLIN : 0) | (events & SLIRP_POLL_OUT ? POLLOUT : 0) | (events & SLIRP_POLL_PRI ? POLLPRI : 0);
    return count++;
}
static int happened(int index, void *o)
{
    (void)o;
    int r = polled[index].revents;
    return (r & POLLIN ? SLIRP_POLL_IN : 0) | (r & POLLOUT ? SLIRP_POLL_OUT : 0) | (r & POLLPRI ? SLIRP_POLL_PRI : 0) | (r & POLLERR ? SLIRP_POLL_ERR : 0) | (r & POLLHUP ? SLIRP_POLL_HUP : 0);
}

int main(int n, char **words)
{
    if (n != 2) return 2;
    tap = open("/dev/net/tun", O_RDWR);
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    strncpy(request.ifr_name, words[1], IFNAMSIZ - 1);
    if (ioctl(tap, TUNSETIFF, &request)) { perror("tap"); return 1; }
    SlirpConfig config = {.version = 1, .in_enabled = true};
    /* Clients of 10.0.0.0/8 count as its own network: it answers them over ARP. */
    config.vnetwork.s_addr = inet_addr("10.0.0.0");
    config.vnetmask.s_addr = inet_addr("255.0.0.0");
    config.vhost.s_addr = inet_addr("10.72.0.2");
    config.vnameserver.s_addr = inet_addr("10.72.0.3");
    config.vdhcp_start.s_addr = inet_addr("10.72.0.4");
    SlirpCb calls = {.send_packet = out, .guest_error = complain, .clock_get_ns = now, .timer_new = timer_new, .timer_free = timer_free, .timer_mod = timer_mod, .register_poll_fd = fd, .unregister_poll_fd = fd, .notify = notify};
    Slirp *slirp = slirp_new(&config, &calls, NULL);
    puts("ready"); fflush(stdout);
    for (;;) {
        uint32_t wait = 500;
        polled[0].fd = tap; polled[0].events = POLLIN; count = 1;
        slirp_pollfds_fill(slirp, &wait, add, NULL);
        int done = poll(polled, count, wait);
        slirp_pollfds_poll(slirp, done < 0, happened, NULL);
        if (done > 0 && polled[0].revents & POLLIN) {
            unsigned char frame[65536];
            ssize_t length = read(tap, frame, sizeof frame);
            if (length > 0) slirp_input(slirp, frame, length);
        }
    }
}
