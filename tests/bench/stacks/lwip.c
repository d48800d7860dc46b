/* An echo server on lwIP: what comes goes back; "!" aborts, "?" is answered by the number of open ones.
   lwip TAP ADDRESS NETMASK GATEWAY PORT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <lwip/tcpip.h>
#include <lwip/tcp.h>
#include <lwip/netif.h>
#include <netif/tapif.h>

static int opened;
static int port;
static struct netif nif;

static void gone(void *arg, err_t err) { (void)arg; (void)err; opened--; }

static err_t got(void *arg, struct tcp_pcb *pcb, struct pbuf *p, err_t err)
{
    (void)arg; (void)err;
    if (p == NULL) { opened--; tcp_err(pcb, NULL); tcp_close(pcb); return ERR_OK; }
    char data[2048];
    u16_t length = pbuf_copy_partial(p, data, sizeof data, 0);
    tcp_recved(pcb, p->tot_len);
    pbuf_free(p);
    if (data[0] == '!') { tcp_abort(pcb); return ERR_ABRT; }
    if (data[0] == '?') length = snprintf(data, sizeof data, "%d\n", opened);
    tcp_write(pcb, data, length, TCP_WRITE_FLAG_COPY);
    tcp_output(pcb);
    return ERR_OK;
}

static err_t came(void *arg, struct tcp_pcb *pcb, err_t err)
{
    (void)arg; (void)err;
    opened++;
    tcp_recv(pcb, got);
    tcp_err(pcb, gone);
    return ERR_OK;
}

static char **args;

static void begin(void *arg)
{
    (void)arg;
    ip4_addr_t address, mask, gateway;
    ip4addr_aton(args[2], &address); ip4addr_aton(args[3], &mask); ip4addr_aton(args[4], &gateway);
    netif_add(&nif, &address, &mask, &gateway, NULL, tapif_init, tcpip_input);
    netif_set_default(&nif); netif_set_up(&nif); netif_set_link_up(&nif);
    struct tcp_pcb *pcb = tcp_new();
    tcp_bind(pcb, IP_ANY_TYPE, port);
    pcb = tcp_listen(pcb);
    tcp_accept(pcb, came);
    puts("ready"); fflush(stdout);
}

int main(int count, char **words)
{
    if (count != 6) return 2;
    args = words; port = atoi(words[5]);
    setenv("PRECONFIGURED_TAPIF", words[1], 1);
    tcpip_init(begin, NULL);
    for (;;) pause();
}
