package node

import (
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
)

// configureNetwork gives the network namespace its address. It stays an island:
// no route leads out of it.
func configureNetwork(serviceRange string) error {
	loopback, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(loopback); err != nil {
		return err
	}
	// kubelet refuses 127.0.0.1 as the address of a node.
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(Address).To4(), Mask: net.CIDRMask(addressLen, addressLen)}}
	if err := netlink.AddrAdd(loopback, address); err != nil {
		return fmt.Errorf("address %s: %w", Address, err)
	}
	// The node itself asks Services too. Their addresses are replaced only after
	// a route was found for them; which one does not matter.
	_, services, err := net.ParseCIDR(serviceRange)
	if err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: loopback.Attrs().Index, Dst: services}); err != nil {
		return fmt.Errorf("route to %s: %w", serviceRange, err)
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1\n"), 0o644)
}
