//! Where the simulator's callbacks go: to whichever of the two receivers takes the connection, as a Service would.

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// Balances connections over these ports of this machine.
pub async fn balance(listener: TcpListener, ports: [u16; 2]) {
    let mut turn = 0;
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        turn += 1;
        let order = [ports[turn % 2], ports[(turn + 1) % 2]];
        tokio::spawn(async move {
            for port in order {
                if let Ok(mut upstream) = TcpStream::connect(("127.0.0.1", port)).await {
                    let _ = copy_bidirectional(&mut stream, &mut upstream).await;
                    return;
                }
            }
        });
    }
}
